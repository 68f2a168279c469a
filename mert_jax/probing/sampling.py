"""Heads on single frames, trained on random frames of many clips that are drawn for each epoch.

All frames of all layers would not fit in memory, and the heads see one frame at a time.

Shapes: N frames, L layers, T frames of a clip, D width, Q choices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mert_jax.probing import head, selection
from mert_jax.probing.cache import Frames
from mert_jax.probing.head import Fitted, HeadSettings
from mert_jax.probing.objectives import Objective

Targets = Callable[[Frames, int], Any]
TRAIN, VALID = 32_768, 16_384  # frames of a training epoch, and of validation


def draw(table: Frames, targets: Targets, count: int, seed: int) -> tuple[np.ndarray, Any]:
    """Draw about `count` frames float16 [N, L, D], equally many of each clip, and their targets.

    `targets` maps a table and a clip's number to arrays [T, ...]. N is the same for every seed.
    """
    rng = np.random.default_rng(seed)
    each = -(-count // len(table.clips))
    features, targets_of = [], []
    for i in range(len(table.clips)):
        x, y = table.features(i), targets(table, i)
        size = min(x.shape[1], len(jax.tree.leaves(y)[0]))
        rows = np.sort(rng.permutation(size)[:each])
        features.append(x[:, rows].swapaxes(0, 1))
        targets_of.append(jax.tree.map(lambda a, rows=rows: a[rows], y))
    return np.concatenate(features), jax.tree.map(lambda *a: np.concatenate(a), *targets_of)


def fit(
    splits: dict[str, Frames], targets: Targets, objective: Objective, settings: HeadSettings
) -> tuple[Fitted, np.ndarray]:
    """Return heads, and the index of each choice's learning rate, by the loss of validation [Q]."""
    settings = settings._replace(batch_size=8 * settings.batch_size)
    valid = draw(splits["valid"], targets, VALID, 0)
    train = functools.partial(draw, splits["train"], targets, TRAIN)
    fitted = head.fit(train, valid, objective, settings)
    return fitted, selection.best(fitted.quality.mean(0).T)
