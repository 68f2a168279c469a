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
define = cli.Define(FLAGS)

_CHECKPOINT = define.string("checkpoint", "", "Student to probe: whatever mert_jax.convert reads.")
_TASK = define.string("task", None, "Name of a task of mert_jax/tasks.", required=True)
_DATA = define.string("data", None, "Folder of the task's data.", required=True)
_OUTPUT = define.string("output", None, "Folder of the results.", required=True)
_CACHE = define.string("cache", "", "Folder of features; default OUTPUT/features.")
_BASELINES = define.list(
    "baselines", [], "Other features in the same table: log_mel, cqt, random, musicnn."
)
_MUSICNN = define.string(
    "musicnn", "", "Weights of that baseline: the .whl of `pip download --no-deps musicnn`."
)
_LAYERS = define.string(
    "layers", "all", "all: each layer and their weighted sum; sum; or numbers, 7 or 3,7."
)
_HEAD = define.enum("head", "linear", ["linear", "mlp"], "mlp: one hidden layer.")
_HIDDEN = define.integer("hidden", 512, "Width of the hidden layer.", 1)
_EPOCHS = define.integer("epochs", 50, "Passes over the clips.", 1)
_BATCH_SIZE = define.integer("batch_size", 64, "Clips a step.", 1)
_RATES = define.list(
    "learning_rates",
    ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"],
    "Learning rates to try; validation chooses.",
)
_SEEDS = define.integer("seeds", 3, "Heads trained of each kind.", 1)


def main() -> int:
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
