"""Scores of predictions [N clips or recordings, C outputs], by the names that tasks use."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mert_jax.errors import UserError
from mert_jax.tasks.task import Clip, Task

NEEDS = {"key": "mir_eval.key", "beats": "mir_eval.util", "separation": "museval.metrics"}


def needed(name: str) -> Any:
    """Import a module of the extra [probes]; museval's needs ffmpeg, too."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as e:
        need = "pip install -e .[probes] and, for separation, apt-get install ffmpeg"
        raise UserError(f"this task's scores need {need}: {e}") from e


def targets(task: Task, clips: Sequence[Clip]) -> np.ndarray:
    """Return labels as an array: class indices int32 [N], tags or values f32 [N, C]."""
    if task.kind != "tags":
        dtype = np.float32 if task.kind == "regression" else np.int32
        return np.array([clip.label for clip in clips], dtype)
    labels = np.zeros((len(clips), len(task.labels)), np.float32)
    for row, clip in zip(labels, clips, strict=True):
        row[list(clip.label)] = 1
    return labels


def by_group(outputs: np.ndarray, clips: Sequence[Clip]) -> tuple[np.ndarray, list[int]]:
    """Average outputs [..., N, C] over clips of a recording; return also its first clip."""
    members: dict[Any, list[int]] = {}
    for i, clip in enumerate(clips):
        members.setdefault(clip.group or i, []).append(i)
    means = [outputs[..., rows, :].mean(-2) for rows in members.values()]
    return np.stack(means, -2), [rows[0] for rows in members.values()]


def score(task: Task, outputs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the task's metrics of outputs [N, C]: logits, or values on the labels' own scale.

    Means over tags leave out those that no or every recording has, whose scores are not defined.
    """
    if task.kind in ("classes", "key"):
        guess = outputs.argmax(-1)
        values = [(guess == truth).mean()]
        if task.kind == "key":
            values.insert(0, key_scores(task.labels)[truth, guess].mean())
    else:
        from sklearn import metrics  # slow to import

        if task.kind == "tags":
            both = truth.any(0) & ~truth.all(0)
            if not both.any():
                raise UserError(f"{task.name}: no tag tells {len(truth)} recordings apart")
            functions = metrics.roc_auc_score, metrics.average_precision_score
            values = [f(truth[:, both], outputs[:, both], average="macro") for f in functions]
        else:
            each = metrics.r2_score(truth, outputs, multioutput="raw_values")
            values = [np.mean(each), *each]
    return dict(zip(task.metrics, map(float, values), strict=True))


@functools.cache
def key_scores(labels: tuple[str, ...]) -> np.ndarray:
    """Return MIREX's score of each pair [truth, guess] of keys: less than 1 for a related key."""
    key = needed("mir_eval.key")
    return np.array([[key.weighted_score(truth, guess) for guess in labels] for truth in labels])
