"""Probes features on a task: from its clips to scores, a table and a picture of the layers."""

import collections
import os
import re
from collections.abc import Sequence
from typing import Any

from mert_jax import progress
from mert_jax.errors import UserError
from mert_jax.files import directory_lock
from mert_jax.probing import beats, cache, pooled, results, scores, separation
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
    Raises UserError for data that are missing or cannot be used, and for an unusable `output`.
    """
    if task.kind in scores.NEEDS:
        scores.needed(scores.NEEDS[task.kind])  # fail early
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
            example = "{path}: {reason}, {detail}".format_map(tables[split].left_out[0])
            problem = f"none of the {len(clips)} clips of {split} can be read: {example}"
            raise UserError(f"{problem}. {task.source}")
    return tables


def _probe_one(
    task: Task, features: Features, tables: dict, settings: HeadSettings, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Train and score the heads of one kind of features: a row of the results."""
    numbers = features.numbers or tuple(range(features.layers))
    # a baseline has one layer and nothing to weigh; chosen layers are compared, not weighed
    if features.layers == 1 or layers:
        settings = settings._replace(single=True, mixed=False)
    if layers and features.layers > 1 and task.kind not in FRAMEWISE:
        if wrong := [layer for layer in layers if layer not in numbers]:
            raise UserError(f"--layers: layer {wrong[0]} is not one of 0 to {numbers[-1]}")
        numbers = layers
        tables = {k: table._replace(x=table.x[:, list(layers)]) for k, table in tables.items()}
    names = [str(number) for number in numbers] if settings.single else []
    names += ["sum"] if settings.mixed else []
    row = FRAMEWISE.get(task.kind, pooled).probe(task, tables, settings, names)
    head = f"mlp of {settings.hidden}" if settings.hidden else "linear"
    return {"name": features.name, "fingerprint": features.fingerprint, "head": head, **row}


def parse_layers(text: str) -> tuple[tuple[int, ...], bool, bool]:
    """Return layer numbers, and whether single layers and their weighted sum have heads."""
    if text in ("all", "sum"):
        return (), text == "all", True
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--layers={text}: give all, sum, or numbers such as 7 or 3,7")
    return tuple(dict.fromkeys(map(int, text.split(",")))), True, False


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
