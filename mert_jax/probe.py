"""What a student's features say of music: heads on frozen features, scored on labelled data.

    python -m mert_jax.probe --checkpoint=PATH --task=GTZANGenre --data=DIR --output=DIR

Layer and learning rate are chosen on the validation split; the test split is scored with several
seeds. Writes OUTPUT/results.json and OUTPUT/layers.png, prints a table. Features are kept in
--cache, so that another head or other layers need no second pass over the audio. Exit code 1: some
audio could not be read, and the results say which.
"""

import collections
import os
from typing import Any

from absl import flags

from mert_jax import cli, files, progress
from mert_jax.errors import UserError
from mert_jax.tasks import task as tasks
from mert_jax.tasks.registry import get_task
from mert_jax.tasks.task import Task

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
    "baselines",
    [],
    "Other features in the same table: log_mel, cqt, random, musicnn.",
    flag_values=FLAGS,
)
_MUSICNN = flags.DEFINE_string(
    "musicnn",
    "",
    "Weights of that baseline: the .whl of `pip download --no-deps musicnn`.",
    flag_values=FLAGS,
)
_LAYERS = flags.DEFINE_string(
    "layers",
    "all",
    "all: each layer and their weighted sum; sum; or numbers, 7 or 3,7.",
    flag_values=FLAGS,
)
_HEAD = flags.DEFINE_enum(
    "head", "linear", ["linear", "mlp"], "mlp: one hidden layer.", flag_values=FLAGS
)
_HIDDEN = flags.DEFINE_integer(
    "hidden", 512, "Width of the hidden layer.", lower_bound=1, flag_values=FLAGS
)
_EPOCHS = flags.DEFINE_integer(
    "epochs", 50, "Passes over the clips.", lower_bound=1, flag_values=FLAGS
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Clips of a step.", lower_bound=1, flag_values=FLAGS
)
_RATES = flags.DEFINE_list(
    "learning_rates",
    ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"],
    "Tried; validation chooses.",
    flag_values=FLAGS,
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Heads trained of each kind.", lower_bound=1, flag_values=FLAGS
)

FRAMEWISE = ("beats", "separation")  # kinds whose heads see frames, not their mean


def probe(
    task: Task,
    data: str,
    output: str,
    made: list[Any],
    settings: Any,
    layers: tuple[int, ...] = (),
    cache_folder: str = "",
) -> dict[str, Any]:
    """Probe the features `made` (of `probing.features`) on `task`, and write the results.

    layers: those looked at, () for all and their weighted sum; a baseline has but one. Raises
    UserError for data that is not there, and a split without any clip that can be read.
    """
    from mert_jax.probing import beats, head, pooled, results, scores, separation

    scores.check(task)
    module = {"beats": beats, "separation": separation}.get(task.kind, pooled)
    splits = task.clips(data)
    for split, clips in splits.items():
        if not clips:
            raise UserError(f"--data={data} has no clip of the split {split}. {task.source}")
    known = {(clip.path, clip.start) for clip in splits["train"]}
    if twice := [clip.path for clip in splits["test"] if (clip.path, clip.start) in known]:
        raise UserError(f"{len(twice)} clips are in train and in test, one of {twice[0]}")
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as e:
        raise UserError(f"--output={output} cannot be written: {e}") from e
    rows, left_out, guess = [], {}, {}
    root = cache_folder or os.path.join(output, "features")
    with files.directory_lock(output):
        for features in made:
            held = _held(task, features, splits, root)
            for split, table in held.items():
                left_out |= {(x["path"], x["start"]): x | {"split": split} for x in table.left_out}
            # a baseline has one layer and nothing to weigh; some layers are compared, not weighed
            one = features.layers == 1
            mine = settings._replace(single=True, mixed=False) if one or layers else settings
            if module is pooled and layers and not one:
                held = {split: _only(table, layers) for split, table in held.items()}
            names = head.names(features.layers, mine, features.numbers or ([] if one else layers))
            with progress.bar(f"{features.name}, heads", mine.epochs, "epoch") as bar:
                row = module.probe(task, held, mine, names, lambda bar=bar: bar.update(1))
            about = {"name": features.name, "fingerprint": features.fingerprint}
            about["head"] = f"mlp of {mine.hidden}" if mine.hidden else "linear"
            rows.append(about | row)
            guess = guess or module.chance(task, held)
    found = {
        "task": task.name,
        "kind": task.kind,
        "metrics": list(task.metrics),
        "paper": task.paper,
        "licence": task.licence,
        "features": rows,
        "chance": guess,
        "clips": {split: len(clips) for split, clips in splits.items()},
        "left_out": list(left_out.values()),
        "settings": {**settings._asdict(), "clip_seconds": task.seconds},
    }
    results.write(output, found)
    return found


def _held(task: Task, features: Any, splits: dict[str, list[tasks.Clip]], root: str) -> Any:
    """The features of each split, computed or found below `root`."""
    from mert_jax.probing import cache

    store = cache.frames if task.kind in FRAMEWISE else cache.pooled
    held = {}
    for split, clips in splits.items():
        with progress.bar(f"{features.name}, {split}", len(clips), "clip") as bar:
            held[split] = store(root, features, clips, bar.update)
        if not held[split].clips:
            said = held[split].left_out[0]
            raise UserError(
                f"none of the {len(clips)} clips of {split} can be read: {said['path']}: "
                f"{said['reason']}, {said['detail']}. {task.source}"
            )
    return held


def _only(table: Any, layers: tuple[int, ...]) -> Any:
    if wrong := [layer for layer in layers if layer >= table.x.shape[1]]:
        raise UserError(f"--layers: there is no layer {wrong[0]}, only 0 to {table.x.shape[1] - 1}")
    return table._replace(x=table.x[:, list(layers)])


def summary(found: dict[str, Any], output: str) -> str:
    """What is printed at the end."""
    from mert_jax.probing import results

    clips = ", ".join(f"{count} {split}" for split, count in found["clips"].items())
    lines = [f"{found['task']}: {clips} clips", results.table(found)]
    reasons = collections.Counter(x["reason"] for x in found["left_out"])
    if reasons:
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        first = found["left_out"][0]
        lines.append(
            f"left out: {said} (results.json names them all; {first['path']}: {first['detail']})"
        )
    return "\n".join([*lines, f"wrote {output}/results.json and {output}/layers.png"])


def parse_layers(text: str) -> tuple[tuple[int, ...], bool, bool]:
    """Layer numbers, and whether there are heads for single layers and for the weighted sum."""
    if text in ("all", "sum"):
        return (), text == "all", True
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if min(found) < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"--layers={text}: give all, sum, or numbers such as 7 or 3,7") from None
    return found, True, False


def main() -> int:
    """Run the command and return its exit code."""
    from mert_jax.probing import features, head

    task = get_task(_TASK.value)
    layers, single, mixed = parse_layers(_LAYERS.value)
    try:
        rates = tuple(float(rate) for rate in _RATES.value)
    except ValueError as e:
        raise UserError(f"--learning_rates: {e}") from e
    settings = head.HeadSettings(
        hidden=_HIDDEN.value if _HEAD.value == "mlp" else 0,
        epochs=_EPOCHS.value,
        batch_size=_BATCH_SIZE.value,
        rates=rates,
        seeds=_SEEDS.value,
        single=single,
        mixed=mixed,
    )
    framewise = task.kind in FRAMEWISE
    computed = layers if framewise else ()
    made = features.make(
        _CHECKPOINT.value, _BASELINES.value, layers=computed, musicnn_at=_MUSICNN.value
    )
    try:
        found = probe(task, _DATA.value, _OUTPUT.value, made, settings, layers, _CACHE.value)
    except KeyboardInterrupt:
        progress.note("stopped; what is embedded is kept: run the same command again to go on")
        return 130
    print(summary(found, _OUTPUT.value))
    return 1 if found["left_out"] else 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
