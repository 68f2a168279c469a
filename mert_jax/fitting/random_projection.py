"""Fitting the random-projection teacher: the dataset's mean and deviation of each mel band.

Shapes: n frames, F bands, K books of d dimensions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.fitting import figures
from mert_jax.fitting.fitted import Fitted, Task
from mert_jax.fitting.mel_rvq import standardised, statistics
from mert_jax.models import quantize, spectrograms
from mert_jax.teachers import random_projection

SETTINGS = dict(n_mels=128, n_fft=2048, hop=320)


def fit(task: Task, **sizes) -> Fitted:
    """Fit to the train split's frames; `sizes` replace some of SETTINGS.

    The figures are those of the default projections and codebooks, their error that of the
    directions of the projected frames.
    """
    settings = SETTINGS | sizes
    task.sampler.check(1)
    params = random_projection.make(**settings).params
    features = lambda wave: spectrograms.log_mel(wave, params["mel_filters"], settings["hop"])
    frames = task.sampler.draw("train", features)
    tensors = statistics(frames)
    books, size = params["codebooks"].shape[:2]
    names = [f"book {k}" for k in range(books)]

    def directions(x: jax.Array) -> jax.Array:
        vectors = random_projection.project(params, x[None])[:, :, 0]  # [K, n, d]
        norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        return (vectors / jnp.maximum(norms, 1e-6)).transpose(1, 0, 2)

    def encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = directions(x)
        codes = jax.vmap(quantize.nearest, (1, 0), 1)(vectors, params["codebooks"])
        rows = jax.vmap(lambda book, code: book[code], (0, 1), 1)(params["codebooks"], codes)
        return codes, jnp.sum(jnp.square(vectors - rows), -1)

    def measure(x: np.ndarray) -> list[figures.Book]:
        x = standardised(x, tensors)
        found = figures.encode(encode, x)
        unit = np.asarray(jax.jit(directions)(x))
        variances = [figures.variance(unit[:, k]) for k in range(books)]
        return figures.measure(*found, names=names, sizes=[size] * books, variances=variances)

    measured = {"train": measure(frames)}
    if task.sampler.has_validation:
        measured["validation"] = measure(task.sampler.draw("validation", features))
    return Fitted(tensors, settings, measured)
