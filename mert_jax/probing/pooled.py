"""Probes of whole clips, from features averaged over time: classes, keys, tags and values."""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.probing import head, objectives, scores, selection
from mert_jax.probing.cache import Pooled
from mert_jax.probing.head import HeadSettings
from mert_jax.tasks.task import Task


def probe(task: Task, splits: dict[str, Pooled], settings: HeadSettings, names: list[str]) -> dict:
    """Train, select on validation, score the test split and return a row of the results."""
    targets = {split: scores.targets(task, table.clips) for split, table in splits.items()}
    learnt, centre, scale = targets, 0, 1
    if task.kind == "regression":
        centre, scale = targets["train"].mean(0), np.maximum(targets["train"].std(0), 1e-6)
        learnt = {split: (y - centre) / scale for split, y in targets.items()}
    train = jax.tree.map(jnp.asarray, (splits["train"].x, learnt["train"]))
    valid = splits["valid"].x, learnt["valid"]
    objective = objectives.Objective(len(task.labels), *objectives.OF_KIND[task.kind])
    fitted = head.fit(lambda epoch: train, valid, objective, settings)

    def score(split: str, choice: int, rate: int) -> list[dict[str, float]]:
        logits = head.predict(fitted, splits[split].x, choice, rate)
        means, firsts = scores.by_group(logits, splits[split].clips)
        return [scores.score(task, x * scale + centre, targets[split][firsts]) for x in means]

    def valid_mean(choice: int, rate: int) -> float:
        return np.mean([row[task.metrics[0]] for row in score("valid", choice, rate)])

    rates = range(len(settings.rates))
    means = [[valid_mean(choice, rate) for rate in rates] for choice in range(len(names))]
    rate_of = selection.best(np.array(means))
    return selection.select(
        names, settings.rates, rate_of, lambda split, choice: score(split, choice, rate_of[choice])
    )


def chance(task: Task, splits: dict[str, Pooled]) -> dict[str, float]:
    """Return the scores of the most frequent class, of the tags' frequencies, or of the mean."""
    train, test = (scores.targets(task, splits[split].clips) for split in ("train", "test"))
    answer = np.bincount(train, minlength=len(task.labels)) if train.ndim == 1 else train.mean(0)
    _, firsts = scores.by_group(np.zeros((len(test), 1)), splits["test"].clips)
    return scores.score(task, np.tile(answer, (len(firsts), 1)), test[firsts])
