"""Scores of predictions, under the names that tasks know them by.

Shapes: N clips or recordings, C outputs.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mert_jax.errors import UserError
from mert_jax.tasks.task import Clip, Task

NEEDS = {"key": "mir_eval.key", "beats": "mir_eval.util", "separation": "museval.metrics"}


def needed(name: str) -> Any:
    """The module `name` of the extra [probes]; UserError without it, or without the programs it
    asks for (museval's ffmpeg and ffprobe)."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this task's scores need an extra: pip install -e .[probes] ({e})") from e
    except RuntimeError as e:
        raise UserError(f"this task's scores need a program, apt-get install ffmpeg: {e}") from e


def check(task: Task) -> None:
    """UserError where a module that the task's scores need is missing, before any work is done."""
    if task.kind in NEEDS:
        needed(NEEDS[task.kind])


def targets(task: Task, clips: Sequence[Clip]) -> np.ndarray:
    """Labels as an array: class indices int32[N], tags or values f32[N, C]."""
    if task.kind == "tags":
        found = np.zeros((len(clips), len(task.labels)), np.float32)
        for row, clip in zip(found, clips, strict=True):
            row[list(clip.label)] = 1
        return found
    dtype = np.float32 if task.kind == "regression" else np.int32
    return np.array([clip.label for clip in clips], dtype)


def by_group(outputs: np.ndarray, clips: Sequence[Clip]) -> tuple[np.ndarray, list[int]]:
    """Mean outputs [..., groups, C] of the clips of each recording, from [..., N, C], and the first
    clip of each."""
    members: dict[Any, list[int]] = {}
    for i, clip in enumerate(clips):
        members.setdefault(clip.group or i, []).append(i)
    found = [outputs[..., rows, :].mean(-2) for rows in members.values()]
    return np.stack(found, -2), [rows[0] for rows in members.values()]


def score(task: Task, outputs: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The task's metrics of outputs [N, C] (logits, or standardised back values) for `targets`.

    Macro means over tags leave out those that no or all recordings have: they have no score.
    """
    made: dict[str, float] = {}
    if task.kind in ("classes", "key"):
        guess = outputs.argmax(-1)
        made["accuracy"] = float((guess == found).mean())
        if task.kind == "key":
            made["weighted_score"] = float(key_scores(task.labels)[found, guess].mean())
    elif task.kind == "tags":
        from sklearn import metrics

        both = found.any(0) & ~found.all(0)
        if not both.any():
            raise UserError(f"{task.name}: no tag tells any two of {len(found)} recordings apart")
        arguments = found[:, both], outputs[:, both]
        made["roc_auc"] = float(metrics.roc_auc_score(*arguments, average="macro"))
        made["average_precision"] = float(
            metrics.average_precision_score(*arguments, average="macro")
        )
    else:
        from sklearn import metrics

        each = metrics.r2_score(found, outputs, multioutput="raw_values")
        made["r2"] = float(np.mean(each))
        made |= {f"r2_{name}": float(x) for name, x in zip(task.labels, each, strict=True)}
    return {name: made[name] for name in task.metrics}


@functools.cache
def key_scores(labels: tuple[str, ...]) -> np.ndarray:
    """MIREX's score of each guess [truth, guess]: 1, for a fifth up 0.5, the relative key 0.3, the
    parallel one 0.2 (mir_eval.key)."""
    key = needed("mir_eval.key")
    return np.array([[key.weighted_score(truth, guess) for guess in labels] for truth in labels])


def chance(task: Task, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """The task's metrics of one answer for all, given `targets` of both splits: the most frequent
    class of training, the share of each tag, the mean of each value."""
    if task.kind in ("classes", "key"):
        answer = np.bincount(train, minlength=len(task.labels)).astype(np.float32)
    else:
        answer = train.mean(0)
    return score(task, np.repeat(answer[None], len(test), 0), test)
