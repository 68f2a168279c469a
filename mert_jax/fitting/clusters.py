"""K-means in bounded memory: greedy k-means++, Lloyd's steps, and dead centres moved.

Shapes: n vectors, V centres, d dimensions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax import progress
from mert_jax.models import quantize

CHUNK = 4096  # vectors whose distances to all centres are in memory at a time
SAMPLE = 16  # vectors for each centre that the first centres are drawn from
TOLERANCE = 5e-4  # stop when a step lowers the error by less than this fraction


def first_centres(x: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return `size` rows of `x` [n, d], far from one another (greedy k-means++).

    Each is the best of a few that are drawn with a probability proportional to their squared
    distance to the nearest earlier one (Arthur and Vassilvitskii 2007).
    """
    x = x[rng.choice(len(x), min(len(x), SAMPLE * size), replace=False)]
    squares = np.square(x).sum(-1)
    trials = 2 + int(np.log(size))
    chosen = [int(rng.integers(len(x)))]
    nearest = np.maximum(squares - 2 * (x @ x[chosen[0]]) + squares[chosen[0]], 0)
    nearest[chosen[0]] = 0
    for _ in range(size - 1):
        candidates = _draw(nearest, trials, rng)
        distances = squares[:, None] - 2 * (x @ x[candidates].T) + squares[candidates]
        remaining = np.clip(distances, 0, nearest[:, None])
        best = int(remaining.sum(0).argmin())
        nearest = remaining[:, best]
        chosen.append(int(candidates[best]))
        nearest[chosen[-1]] = 0  # not exactly 0 by rounding
    return x[chosen]


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` indices with probabilities proportional to `weights`, equal if all are 0."""
    total = weights.sum(dtype=np.float64)
    return rng.choice(len(weights), count, p=weights / total if total > 0 else None)


def fit(x: np.ndarray, size: int, seed: list[int], iterations: int, name: str) -> np.ndarray:
    """Return centres f32 [V, d] of `x` [n, d], after at most `iterations` steps.

    A centre that loses all its vectors is moved to one with a large error.
    """
    rng = np.random.default_rng(seed)
    centres = jnp.asarray(first_centres(x, size, rng))
    count = -(-len(x) // CHUNK)
    # equal chunks: fewer vectors than there are chunks are left out
    chunks = jnp.asarray(x[: len(x) // count * count].reshape(count, -1, x.shape[-1]))
    step, previous = jax.jit(quantize.kmeans_step), np.inf
    with progress.bar(name, iterations, "step") as bar:
        for _ in range(iterations):
            centres, members, squares = step(chunks, centres)
            squares = np.asarray(squares).reshape(-1)
            error = float(squares.mean(dtype=np.float64))
            dead = np.flatnonzero(np.asarray(members) == 0)
            bar.set_postfix_str(f"error {error:.4g}, {dead.size} dead", refresh=False)
            bar.update()
            if dead.size:
                drawn = chunks.reshape(-1, x.shape[-1])[_draw(squares, dead.size, rng)]
                centres = centres.at[dead].set(drawn)
            elif previous - error <= TOLERANCE * error:
                break
            previous = error
        bar.total = bar.n  # converged before the last iteration
    return np.asarray(centres)
