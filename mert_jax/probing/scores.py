"""Scores of predictions, by the names that tasks use.

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
    """Import the module `name` of the extra [probes].

    Raises UserError if it, or a program that it needs (ffmpeg for museval), is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this task's scores need an extra: pip install -e .[probes] ({e})") from e
    except RuntimeError as e:
        raise UserError(f"this task's scores need a program, apt-get install ffmpeg: {e}") from e


def check(task: Task) -> None:
    """Raise UserError early if a module that the task's scores need is missing."""
    if task.kind in NEEDS:
        needed(NEEDS[task.kind])


def targets(task: Task, clips: Sequence[Clip]) -> np.ndarray:
    """Return labels as an array: class indices int32 [N], tags or values f32 [N, C]."""
    if task.kind == "tags":
        labels = np.zeros((len(clips), len(task.labels)), np.float32)
        for row, clip in zip(labels, clips, strict=True):
            row[list(clip.label)] = 1
        return labels
    dtype = np.float32 if task.kind == "regression" else np.int32
    return np.array([clip.label for clip in clips], dtype)


def by_group(outputs: np.ndarray, clips: Sequence[Clip]) -> tuple[np.ndarray, list[int]]:
    """Average outputs [..., N, C] over the clips of each recording: [..., groups, C].

    Return also the first clip of each recording.
    """
    members: dict[Any, list[int]] = {}
    for i, clip in enumerate(clips):
        members.setdefault(clip.group or i, []).append(i)
    means = [outputs[..., rows, :].mean(-2) for rows in members.values()]
    return np.stack(means, -2), [rows[0] for rows in members.values()]


def score(task: Task, outputs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the task's metrics of outputs [N, C]: logits, or values on the labels' own scale.

    Means over tags leave out tags that no recording or every recording has, whose scores are not
    defined. Raises UserError if that leaves none.
    """
    values: dict[str, float] = {}
    if task.kind in ("classes", "key"):
        guess = outputs.argmax(-1)
        values["accuracy"] = float((guess == truth).mean())
        if task.kind == "key":
            values["weighted_score"] = float(key_scores(task.labels)[truth, guess].mean())
    elif task.kind == "tags":
        from sklearn import metrics  # slow to import

        both = truth.any(0) & ~truth.all(0)
        if not both.any():
            raise UserError(f"{task.name}: no tag tells any two of {len(truth)} recordings apart")
        arguments = truth[:, both], outputs[:, both]
        values["roc_auc"] = float(metrics.roc_auc_score(*arguments, average="macro"))
        values["average_precision"] = float(
            metrics.average_precision_score(*arguments, average="macro")
        )
    else:
        from sklearn import metrics  # slow to import

        each = metrics.r2_score(truth, outputs, multioutput="raw_values")
        values["r2"] = float(np.mean(each))
        values |= {f"r2_{name}": float(x) for name, x in zip(task.labels, each, strict=True)}
    return {name: values[name] for name in task.metrics}


@functools.cache
def key_scores(labels: tuple[str, ...]) -> np.ndarray:
    """Return MIREX's score of each pair [truth, guess] of keys (mir_eval.key).

    1 for the key itself, 0.5 a fifth above, 0.3 for the relative and 0.2 for the parallel key.
    """
    key = needed("mir_eval.key")
    return np.array([[key.weighted_score(truth, guess) for guess in labels] for truth in labels])


def chance(task: Task, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Return the task's metrics of the best constant answer, given the targets of both splits.

    It is the most frequent class of training, the frequency of each tag, or the mean of each value.
    """
    if task.kind in ("classes", "key"):
        answer = np.bincount(train, minlength=len(task.labels)).astype(np.float32)
    else:
        answer = train.mean(0)
    return score(task, np.repeat(answer[None], len(test), 0), test)
