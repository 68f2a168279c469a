"""Fitting MERT v0's acoustic teacher: two codebooks, on log-mel and on chroma."""

import functools

import numpy as np

from mert_jax.fitting import clusters, figures
from mert_jax.fitting.fitted import Fitted, Task
from mert_jax.teachers import kmeans

BOOKS = ("log_mel", "chroma")


def fit(task: Task, **sizes) -> Fitted:
    """Cluster the train split's frames; `sizes` replace some of `kmeans.SETTINGS`."""
    settings = kmeans.SETTINGS | sizes
    centres = [settings["mel_size"], settings["chroma_size"]]
    task.sampler.check(max(centres))
    filters = kmeans.filters(settings)
    features = functools.partial(kmeans.features, filters, hop=settings["hop"])
    frames = task.sampler.draw("train", features)
    tensors = {
        f"{name}_centres": clusters.fit(
            x,
            size,
            rng=np.random.default_rng([task.seed, book]),
            iterations=task.iterations,
            what=name,
        )
        for book, (name, x, size) in enumerate(zip(BOOKS, frames, centres, strict=True))
    }
    encode = functools.partial(kmeans.encode, tensors)

    def measure(x: tuple[np.ndarray, ...]) -> list[figures.Book]:
        found = figures.encode(encode, x)
        variances = [figures.variance(each) for each in x]
        return figures.measure(*found, names=BOOKS, sizes=centres, variances=variances)

    measured = {"train": measure(frames)}
    if task.sampler.has_validation:
        del frames
        measured["validation"] = measure(task.sampler.draw("validation", features))
    return Fitted(tensors, settings, measured)
