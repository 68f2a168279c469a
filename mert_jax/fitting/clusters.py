"""K-means in bounded memory: first centres, Lloyd's steps, dead centres set elsewhere.

Shapes: n vectors, V centres, d dimensions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax import progress
from mert_jax.models import quantize

CHUNK = 4096  # vectors whose distances to all centres are held at a time
SAMPLE = 16  # vectors for each centre that the first centres are drawn from
TOLERANCE = 5e-4  # stop when a step lowers the error by less than this part of it


def first_centres(x: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` rows of `x` [n, d], far from one another: each is the best of a few, drawn with a
    probability proportional to their squared distance to the nearest one before (greedy k-means++,
    Arthur and Vassilvitskii 2007)."""
    x = x[rng.choice(len(x), min(len(x), SAMPLE * size), replace=False)]
    squares = np.square(x).sum(-1)
    trials = 2 + int(np.log(size))
    chosen = [int(rng.integers(len(x)))]
    left = np.maximum(squares - 2 * (x @ x[chosen[0]]) + squares[chosen[0]], 0)
    left[chosen[0]] = 0
    for _ in range(size - 1):
        candidates = _draw(left, trials, rng)
        distances = squares[:, None] - 2 * (x @ x[candidates].T) + squares[candidates]
        remaining = np.clip(distances, 0, left[:, None])
        best = int(remaining.sum(0).argmin())
        left = remaining[:, best]
        # rounding leaves a row some distance to itself
        left[candidates[best]] = 0
        chosen.append(int(candidates[best]))
    return x[chosen]


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices with probabilities proportional to `weights`; any, where all are 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    if cumulative[-1] <= 0:
        return rng.integers(len(weights), size=count)
    found = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], "right")
    return np.minimum(found, len(weights) - 1)


def fit(
    x: np.ndarray, size: int, *, rng: np.random.Generator, iterations: int, what: str
) -> np.ndarray:
    """Centres f32 [V, d] of `x` [n, d], after at most `iterations` steps.

    A centre that loses all its vectors is set on one of those badly served, drawn as the first
    ones were.
    """
    centres = jnp.asarray(first_centres(x, size, rng))
    count = -(-len(x) // CHUNK)
    # fewer vectors than there are chunks are left over, and out
    chunks = jnp.asarray(x[: len(x) // count * count].reshape(count, -1, x.shape[-1]))
    step = jax.jit(quantize.kmeans_step)
    before = np.inf
    with progress.bar(what, iterations, "step") as bar:
        for _ in range(iterations):
            centres, members, squares = step(chunks, centres)
            squares = np.asarray(squares).reshape(-1)
            error = float(squares.mean(dtype=np.float64))
            dead = np.flatnonzero(np.asarray(members) == 0)
            bar.set_postfix_str(f"error {error:.4g}, {dead.size} dead", refresh=False)
            bar.update()
            if dead.size:
                fresh = chunks.reshape(-1, x.shape[-1])[_draw(squares, dead.size, rng)]
                centres = centres.at[dead].set(fresh)
            elif before - error <= TOLERANCE * error:
                break
            before = error
        bar.total = bar.n  # converged before the last iteration
    return np.asarray(centres)
