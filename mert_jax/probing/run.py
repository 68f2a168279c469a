"""Probes features on a task: from its clips to scores, a table and a picture of the layers."""

import collections
import os
from collections.abc import Sequence
from typing import Any

from mert_jax import progress
from mert_jax.errors import UserError
from mert_jax.files import directory_lock
from mert_jax.probing import beats, cache, head, pooled, results, scores, separation
from mert_jax.probing.features import Features
from mert_jax.probing.head import HeadSettings
from mert_jax.tasks.task import Clip, Task

FRAMEWISE = {"beats": beats, "separation": separation}  # kinds whose heads see single frames


def probe(
    task: Task,
    data: str,
    output: str,
    features: Sequence[Features],
    settings: HeadSettings,
    layers: tuple[int, ...] = (),
    cache_folder: str = "",
) -> dict[str, Any]:
    """Probe `features` on `task`, write the results to `output` and return them.

    `layers` are the layers to compare, () for all and their weighted sum; a baseline has one.
    Raises UserError for missing data, a split without any clip that can be read, clips in both
    train and test, and an unusable `output`.
    """
    scores.check(task)
    splits = _read_splits(task, data)
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as e:
        raise UserError(f"--output={output} cannot be written: {e}") from e
    root = cache_folder or os.path.join(output, "features")
    rows, left_out, chance = [], {}, {}
    with directory_lock(output):
        for each in features:
            tables = _compute_features(task, each, splits, root)
            for split, table in tables.items():
                left_out |= {(x["path"], x["start"]): x | {"split": split} for x in table.left_out}
            rows.append(_probe_one(task, each, tables, settings, layers))
            chance = chance or FRAMEWISE.get(task.kind, pooled).chance(task, tables)
        report = {
            "task": task.name,
            "kind": task.kind,
            "metrics": list(task.metrics),
            "paper": task.paper,
            "licence": task.licence,
            "features": rows,
            "chance": chance,
            "clips": {split: len(clips) for split, clips in splits.items()},
            "left_out": list(left_out.values()),
            "settings": {**settings._asdict(), "clip_seconds": task.seconds},
        }
        results.write(output, report)
    return report


def _read_splits(task: Task, data: str) -> dict[str, list[Clip]]:
    splits = task.clips(data)
    for split, clips in splits.items():
        if not clips:
            raise UserError(f"--data={data} has no clip of the split {split}. {task.source}")
    train = {(clip.path, clip.start) for clip in splits["train"]}
    if shared := [clip.path for clip in splits["test"] if (clip.path, clip.start) in train]:
        raise UserError(f"{len(shared)} clips are in train and in test, one of {shared[0]}")
    return splits


def _compute_features(
    task: Task, features: Features, splits: dict[str, list[Clip]], root: str
) -> dict[str, Any]:
    """Return the features of each split, computed or read from the cache in `root`."""
    store = cache.frames if task.kind in FRAMEWISE else cache.pooled
    tables = {}
    for split, clips in splits.items():
        with progress.bar(f"{features.name}, {split}", len(clips), "clip") as bar:
            tables[split] = store(root, features, clips, bar.update)
        if not tables[split].clips:
            skipped = tables[split].left_out[0]
            raise UserError(
                f"none of the {len(clips)} clips of {split} can be read: {skipped['path']}: "
                f"{skipped['reason']}, {skipped['detail']}. {task.source}"
            )
    return tables


def _probe_one(
    task: Task,
    features: Features,
    tables: dict[str, Any],
    settings: HeadSettings,
    layers: tuple[int, ...],
) -> dict[str, Any]:
    """Train and score the heads of one kind of features: a row of the results."""
    # a baseline has one layer and nothing to weigh; chosen layers are compared, not weighed
    single = features.layers == 1
    if single or layers:
        settings = settings._replace(single=True, mixed=False)
    if layers and not single and task.kind not in FRAMEWISE:
        tables = {split: _select_layers(table, layers) for split, table in tables.items()}
    names = head.names(features.layers, settings, features.numbers or ([] if single else layers))
    module = FRAMEWISE.get(task.kind, pooled)
    with progress.bar(f"{features.name}, heads", settings.epochs, "epoch") as bar:
        row = module.probe(task, tables, settings, names, lambda: bar.update(1))
    return {
        "name": features.name,
        "fingerprint": features.fingerprint,
        "head": f"mlp of {settings.hidden}" if settings.hidden else "linear",
        **row,
    }


def _select_layers(table: cache.Pooled, layers: tuple[int, ...]) -> cache.Pooled:
    last = table.x.shape[1] - 1
    if wrong := [layer for layer in layers if layer > last]:
        raise UserError(f"--layers: there is no layer {wrong[0]}, only 0 to {last}")
    return table._replace(x=table.x[:, list(layers)])


def parse_layers(text: str) -> tuple[tuple[int, ...], bool, bool]:
    """Return layer numbers, and whether single layers and their weighted sum have heads."""
    if text in ("all", "sum"):
        return (), text == "all", True
    try:
        layers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if min(layers) < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"--layers={text}: give all, sum, or numbers such as 7 or 3,7") from None
    return layers, True, False


def summary(report: dict[str, Any], output: str) -> str:
    """Return the text that is printed at the end: clips, scores, skipped clips, files."""
    clips = ", ".join(f"{count} {split}" for split, count in report["clips"].items())
    lines = [f"{report['task']}: {clips} clips", results.table(report)]
    if report["left_out"]:
        reasons = collections.Counter(x["reason"] for x in report["left_out"])
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        example = "{path}: {detail}".format_map(report["left_out"][0])
        lines.append(f"left out: {counts} (results.json names them all; {example})")
    return "\n".join([*lines, f"wrote {output}/results.json and {output}/layers.png"])
