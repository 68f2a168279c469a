"""The fits of clusters and statistics by teacher."""

from collections.abc import Callable

from mert_jax.fitting import kmeans, mel_rvq, random_projection
from mert_jax.fitting.fitted import Fitted, Task


def fitters() -> dict[str, Callable[[Task], Fitted]]:
    """How each teacher is fitted, by name."""
    return {
        "kmeans": kmeans.fit,
        "mel_rvq": mel_rvq.fit,
        "random_projection": random_projection.fit,
    }
