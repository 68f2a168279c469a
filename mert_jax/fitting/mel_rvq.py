"""Fitting MuQ's teacher: normalisation, then projection and codebook of one level after another.

Shapes: n frames, F bands, K books of V rows of d dimensions.
"""

import functools

import jax.numpy as jnp
import numpy as np

from mert_jax.errors import UserError
from mert_jax.fitting import clusters, figures
from mert_jax.fitting.fitted import Fitted, Task
from mert_jax.models import spectrograms
from mert_jax.teachers import mel_rvq


def principal(x: np.ndarray, dim: int) -> np.ndarray:
    """Orthonormal columns [F, d] that keep the most of the squares of `x` [n, F]: the best linear
    projection and back (Eckart and Young 1936), where MuQ trains both by gradient.

    Every level has its own: on 2 h of music, 8 books of 256 then leave 16% of the variance of
    held-out tracks, and 20% with one projection for all, 19% with none.
    """
    moments = np.matmul(x.T, x).astype(np.float64) / len(x)
    columns = np.linalg.eigh(moments)[1][:, ::-1][:, :dim]
    # an eigenvector's sign is the solver's whim
    largest = columns[np.abs(columns).argmax(0), np.arange(dim)]
    return (columns * np.sign(largest)).astype(np.float32)


def statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    """`mean` and `std` f32 [F] of the rows of `x` [n, F]."""
    return {
        "mean": x.mean(0, dtype=np.float64).astype(np.float32),
        "std": x.std(0, dtype=np.float64).astype(np.float32),
    }


def standardised(x: np.ndarray, found: dict[str, np.ndarray]) -> np.ndarray:
    """`x` [n, F] as the teacher will see it."""
    return np.asarray(
        spectrograms.standardise(jnp.asarray(x), found["mean"][None], found["std"][None])
    )


def fit(task: Task, **sizes) -> Fitted:
    """Fit to the train split's frames; `sizes` replace some of `mel_rvq.SETTINGS`."""
    settings = mel_rvq.SETTINGS | sizes
    books, size, dim = settings["books"], settings["size"], settings["dim"]
    if dim > settings["n_mels"]:
        raise UserError(f"dim {dim} is more than the {settings['n_mels']} mel bands; lower it")
    task.sampler.check(size)
    filters = mel_rvq.filters(settings)
    features = lambda wave: spectrograms.log_mel(wave, filters["mel_filters"], settings["hop"])
    frames = task.sampler.draw("train", features)
    tensors = statistics(frames)
    frames = standardised(frames, tensors)
    names = [f"level {k}" for k in range(books)]
    projections, codebooks, residual = [], [], frames.copy()
    for k in range(books):
        projections.append(principal(residual, dim))
        projected = residual @ projections[-1]
        rng = np.random.default_rng([task.seed, k])
        options = dict(rng=rng, iterations=task.iterations, what=names[k])
        codebooks.append(clusters.fit(projected, size, **options))
        last = {"projections": projections[-1][None], "codebooks": codebooks[-1][None]}
        codes, _ = figures.encode(functools.partial(mel_rvq.encode, last), residual)
        residual -= codebooks[-1][codes[:, 0]] @ projections[-1].T
    tensors |= {"projections": np.stack(projections), "codebooks": np.stack(codebooks)}
    encode = functools.partial(mel_rvq.encode, tensors)

    def measure(x: np.ndarray) -> list[figures.Book]:
        variances = [figures.variance(x)] * books
        found = figures.encode(encode, x)
        return figures.measure(*found, names=names, sizes=[size] * books, variances=variances)

    measured = {"train": measure(frames)}
    if task.sampler.has_validation:
        del frames, residual
        held = standardised(task.sampler.draw("validation", features), tensors)
        measured["validation"] = measure(held)
    return Fitted(tensors, settings, measured)
