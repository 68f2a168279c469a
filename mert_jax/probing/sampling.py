"""Random frames of many clips, drawn for each epoch.

All frames of all layers would not fit in memory, and the heads see one frame at a time.

Shapes: N frames, L layers, T frames of a clip, D width.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mert_jax.probing.cache import Frames

TRAIN, VALID = 32_768, 16_384  # frames of a training epoch, and of validation


def draw(
    table: Frames, targets: Callable[[int], Any], count: int, seed: int
) -> tuple[np.ndarray, Any]:
    """Draw about `count` frames float16 [N, L, D], equally many of each clip, and their targets.

    `targets` maps a clip's number to arrays [T, ...]. N is the same for every seed.
    """
    rng = np.random.default_rng(seed)
    each = -(-count // len(table.clips))
    features, targets_of = [], []
    for i in range(len(table.clips)):
        x, y = table.features(i), targets(i)
        size = min(x.shape[1], len(jax.tree.leaves(y)[0]))
        rows = np.sort(rng.permutation(size)[:each])
        features.append(x[:, rows].swapaxes(0, 1))
        targets_of.append(jax.tree.map(lambda a, rows=rows: a[rows], y))
    return np.concatenate(features), jax.tree.map(lambda *a: np.concatenate(a), *targets_of)
