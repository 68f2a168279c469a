"""Probes of whole clips, from features averaged over time: classes, keys, tags and values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.probing import head, objectives, scores, selection
from mert_jax.probing.cache import Pooled
from mert_jax.tasks.task import Task


def probe(
    task: Task,
    splits: dict[str, Pooled],
    settings: head.HeadSettings,
    names: list[str],
    tick: Callable[[], Any],
) -> selection.Row:
    """Train, select on validation, score the test split and return a row of the results."""
    targets = {split: scores.targets(task, table.clips) for split, table in splits.items()}
    centre, scale = np.zeros(1, np.float32), np.ones(1, np.float32)
    if task.kind == "regression":
        centre, scale = targets["train"].mean(0), np.maximum(targets["train"].std(0), 1e-6)
        objective = objectives.values(len(task.labels))
    elif task.kind == "tags":
        objective = objectives.tags(len(task.labels))
    else:
        objective = objectives.classes(len(task.labels))
    learnt = (
        {split: (y - centre[None]) / scale[None] for split, y in targets.items()}
        if task.kind == "regression"
        else targets
    )
    train = jax.tree.map(jnp.asarray, (splits["train"].x, learnt["train"]))
    fitted = head.fit(
        lambda epoch: train, (splits["valid"].x, learnt["valid"]), objective, settings, tick
    )

    def scored(split: str, choice: int, rate: int) -> list[dict[str, float]]:
        logits = head.predict(fitted, splits[split].x, choice, rate)
        means, firsts = scores.by_group(logits, splits[split].clips)
        if task.kind == "regression":
            means = means * scale + centre
        return [scores.score(task, one, targets[split][firsts]) for one in means]

    def test(choice: int, rate: int) -> dict[str, list[float]]:
        rows = scored("test", choice, rate)
        return {name: [row[name] for row in rows] for name in task.metrics}

    valid = [
        [
            [row[task.metrics[0]] for row in scored("valid", choice, rate)]
            for rate in range(len(settings.rates))
        ]
        for choice in range(len(names))
    ]
    return selection.select(np.array(valid), names, settings.rates, task.metrics, test)


def chance(task: Task, splits: dict[str, Pooled]) -> dict[str, float]:
    """Return the scores of the best constant answer."""
    train = scores.targets(task, splits["train"].clips)
    test = scores.targets(task, splits["test"].clips)
    _, firsts = scores.by_group(np.zeros((len(test), 1)), splits["test"].clips)
    return scores.chance(task, train, test[firsts])
