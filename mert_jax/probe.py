"""Probe a student's features: heads on frozen features, scored on labelled music.

    python -m mert_jax.probe --checkpoint=PATH --task=GTZANGenre --data=DIR --output=DIR

Layer and learning rate are chosen on the validation split; the test split is scored with several
seeds. Writes OUTPUT/results.json and OUTPUT/layers.png and prints a table. Features are stored in
--cache, so that another head or other layers need no second pass over the audio. Exit code 1: some
audio could not be read; the results name it.
"""

from absl import flags

from mert_jax import cli, progress
from mert_jax.errors import UserError
from mert_jax.probing import features
from mert_jax.probing.head import HeadSettings
from mert_jax.probing.run import FRAMEWISE, parse_layers, probe, summary
from mert_jax.tasks.registry import get_task

FLAGS = flags.FlagValues()

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Student to probe: whatever mert_jax.convert reads.", flag_values=FLAGS
)
_TASK = flags.DEFINE_string(
    "task", None, "Name of a task of mert_jax/tasks.", required=True, flag_values=FLAGS
)
_DATA = flags.DEFINE_string(
    "data", None, "Folder of the task's data.", required=True, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the results.", required=True, flag_values=FLAGS
)
_CACHE = flags.DEFINE_string(
    "cache", "", "Folder of features; default OUTPUT/features.", flag_values=FLAGS
)
_BASELINES = flags.DEFINE_list(
    *("baselines", [], "Other features in the same table: log_mel, cqt, random, musicnn."),
    flag_values=FLAGS,
)
_MUSICNN = flags.DEFINE_string(
    *("musicnn", "", "Weights of that baseline: the .whl of `pip download --no-deps musicnn`."),
    flag_values=FLAGS,
)
_LAYERS = flags.DEFINE_string(
    *("layers", "all", "all: each layer and their weighted sum; sum; or numbers, 7 or 3,7."),
    flag_values=FLAGS,
)
_HEAD = flags.DEFINE_enum(
    "head", "linear", ["linear", "mlp"], "mlp: one hidden layer.", flag_values=FLAGS
)
_HIDDEN = flags.DEFINE_integer("hidden", 512, "Width of the hidden layer.", 1, flag_values=FLAGS)
_EPOCHS = flags.DEFINE_integer("epochs", 50, "Passes over the clips.", 1, flag_values=FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Clips a step.", 1, flag_values=FLAGS)
_RATES = flags.DEFINE_list(
    *("learning_rates", ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"]),
    "Learning rates to try; validation chooses.",
    flag_values=FLAGS,
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Heads trained of each kind.", 1, flag_values=FLAGS)


def main() -> int:
    """Run the command and return its exit code."""
    task = get_task(_TASK.value)
    layers, single, mixed = parse_layers(_LAYERS.value)
    try:
        rates = tuple(float(rate) for rate in _RATES.value)
    except ValueError as e:
        raise UserError(f"--learning_rates: {e}") from e
    settings = HeadSettings(
        hidden=_HIDDEN.value if _HEAD.value == "mlp" else 0,
        epochs=_EPOCHS.value,
        batch_size=_BATCH_SIZE.value,
        rates=rates,
        seeds=_SEEDS.value,
        single=single,
        mixed=mixed,
    )
    computed = layers if task.kind in FRAMEWISE else ()
    rows = features.make(
        _CHECKPOINT.value, _BASELINES.value, layers=computed, musicnn_at=_MUSICNN.value
    )
    try:
        report = probe(task, _DATA.value, _OUTPUT.value, rows, settings, layers, _CACHE.value)
    except KeyboardInterrupt:
        progress.note("stopped; computed features are kept: run the same command to continue")
        return 130
    print(summary(report, _OUTPUT.value))
    return 1 if report["left_out"] else 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
