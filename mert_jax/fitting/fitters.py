"""Fits of the teachers that are clusters or statistics: kmeans, mel_rvq and random_projection.

Each fitter draws frames of the train split, computes the teacher's arrays, and measures them on
both splits. Shapes: n frames, F bands, K codebooks of V rows of d dimensions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.errors import UserError
from mert_jax.fitting import clusters, figures
from mert_jax.fitting.figures import Book
from mert_jax.fitting.sampling import Sampler
from mert_jax.models import quantize, spectrograms
from mert_jax.teachers import kmeans, mel_rvq, random_projection

Array = jax.Array


class Fitted(NamedTuple):
    """A fitted teacher: its arrays, the settings of their sizes, and its codebooks' figures by
    split ("train" and, if the dataset has one, "validation")."""

    tensors: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    figures: Mapping[str, list[Book]]


def fit_kmeans(sampler: Sampler, iterations: int, **sizes) -> Fitted:
    """Cluster log-mel and chroma frames; `sizes` replace some of `kmeans.SETTINGS`."""
    settings = kmeans.SETTINGS | sizes
    names, centres = ("log_mel", "chroma"), [settings["mel_size"], settings["chroma_size"]]
    sampler.check(max(centres))
    features = functools.partial(kmeans.features, kmeans.filters(settings), hop=settings["hop"])
    frames = sampler.draw("train", features)
    tensors = {}
    for k, (name, x, size) in enumerate(zip(names, frames, centres, strict=True)):
        rng = np.random.default_rng([sampler.seed, k])
        tensors[f"{name}_centres"] = clusters.fit(x, size, rng, iterations, name)

    def measure(x: tuple[np.ndarray, ...]) -> list[Book]:
        codes, squares = figures.encode(functools.partial(kmeans.encode, tensors), x)
        variances = [figures.variance(each) for each in x]
        return figures.measure(codes, squares, names, centres, variances)

    return Fitted(tensors, settings, _by_split(measure, sampler, features, frames))


def fit_mel_rvq(sampler: Sampler, iterations: int, **sizes) -> Fitted:
    """Fit normalisation, then projection and codebook of one level after another.

    `sizes` replace some of `mel_rvq.SETTINGS`. Raises UserError if `dim` is above `n_mels`.
    """
    settings = mel_rvq.SETTINGS | sizes
    num_codebooks, size, dim = settings["books"], settings["size"], settings["dim"]
    if dim > settings["n_mels"]:
        raise UserError(f"dim {dim} is more than the {settings['n_mels']} mel bands; lower it")
    sampler.check(size)
    features = _log_mel(mel_rvq.filters(settings), settings)
    frames = sampler.draw("train", features)
    tensors = _statistics(frames)
    names = [f"level {k}" for k in range(num_codebooks)]
    projections, codebooks, residual = [], [], _standardise(frames, tensors)
    for k in range(num_codebooks):
        projection = principal_columns(residual, dim)
        rng = np.random.default_rng([sampler.seed, k])
        codebook = clusters.fit(residual @ projection, size, rng, iterations, names[k])
        level = {"projections": projection[None], "codebooks": codebook[None]}
        codes, _ = figures.encode(functools.partial(mel_rvq.encode, level), residual)
        residual = residual - codebook[codes[:, 0]] @ projection.T
        projections.append(projection)
        codebooks.append(codebook)
    tensors |= {"projections": np.stack(projections), "codebooks": np.stack(codebooks)}

    def measure(x: np.ndarray) -> list[Book]:
        x = _standardise(x, tensors)
        codes, squares = figures.encode(functools.partial(mel_rvq.encode, tensors), x)
        variances = [figures.variance(x)] * num_codebooks
        return figures.measure(codes, squares, names, [size] * num_codebooks, variances)

    return Fitted(tensors, settings, _by_split(measure, sampler, features, frames))


def fit_random_projection(sampler: Sampler, iterations: int) -> Fitted:
    """Compute the mean and deviation of each mel band; `iterations` is not used.

    The figures are those of the default projections and codebooks, the errors those of the
    directions of the projected frames.
    """
    settings = dict(n_mels=128, n_fft=2048, hop=320)
    sampler.check(1)
    params = random_projection.make(**settings).params
    features = _log_mel(params, settings)
    frames = sampler.draw("train", features)
    tensors = _statistics(frames)
    num_codebooks, size = params["codebooks"].shape[:2]
    names = [f"book {k}" for k in range(num_codebooks)]

    def directions(x: Array) -> Array:
        vectors = random_projection.project(params, x[None, None])[:, 0, 0]  # [K, d]
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)

    def encode(x: Array) -> tuple[Array, Array]:
        vectors = directions(x)
        codes = jax.vmap(quantize.nearest)(vectors, params["codebooks"])
        rows = jnp.asarray(params["codebooks"])[np.arange(num_codebooks), codes]
        return codes, jnp.sum(jnp.square(vectors - rows), -1)

    def measure(x: np.ndarray) -> list[Book]:
        x = _standardise(x, tensors)
        codes, squares = figures.encode(encode, x)
        unit = np.asarray(jax.jit(jax.vmap(directions))(x))
        variances = [figures.variance(unit[:, k]) for k in range(num_codebooks)]
        return figures.measure(codes, squares, names, [size] * num_codebooks, variances)

    return Fitted(tensors, settings, _by_split(measure, sampler, features, frames))


FITTERS: dict[str, Callable[[Sampler, int], Fitted]] = {
    kmeans.NAME: fit_kmeans,
    mel_rvq.NAME: fit_mel_rvq,
    random_projection.NAME: fit_random_projection,
}


def principal_columns(x: np.ndarray, dim: int) -> np.ndarray:
    """Return orthonormal columns [F, d] that keep the most of the squares of `x` [n, F].

    They are the best linear projection and back (Eckart and Young 1936); MuQ trains both by
    gradient. Each level has its own: on 2 h of music, 8 codebooks of 256 then leave 16% of the
    variance of held-out tracks, with one projection for all 20%, with none 19%.
    """
    moments = np.matmul(x.T, x).astype(np.float64) / len(x)
    columns = np.linalg.eigh(moments)[1][:, ::-1][:, :dim]
    # the sign of an eigenvector depends on the solver
    largest = columns[np.abs(columns).argmax(0), np.arange(dim)]
    return (columns * np.sign(largest)).astype(np.float32)


def _log_mel(params: Mapping[str, Any], settings: Mapping[str, Any]) -> Callable[[Array], Array]:
    filters, hop = params["mel_filters"], settings["hop"]
    return functools.partial(spectrograms.log_mel, filters=filters, hop=hop)


def _statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and std f32 [F] of the rows of `x` [n, F]."""
    return {
        "mean": x.mean(0, dtype=np.float64).astype(np.float32),
        "std": x.std(0, dtype=np.float64).astype(np.float32),
    }


def _standardise(x: np.ndarray, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    mean, std = tensors["mean"][None], tensors["std"][None]
    return np.asarray(spectrograms.standardise(jnp.asarray(x), mean, std))


def _by_split(
    measure: Callable[[Any], list[Book]], sampler: Sampler, features: Callable, frames: Any
) -> dict[str, list[Book]]:
    """Figures of the train split's `frames` and, if there are any, of held-out ones."""
    by_split = {"train": measure(frames)}
    if sampler.has_validation:
        by_split["validation"] = measure(sampler.draw("validation", features))
    return by_split
