"""Fits of the teachers that are clusters or statistics: their files, and reports beside them.

Shapes: n frames, F bands, K codebooks of V rows of d dimensions.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.constants import HOP_LENGTH
from mert_jax.data.code_checks import perplexity
from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.fitting import clusters
from mert_jax.fitting.sampling import Sampler
from mert_jax.models import spectrograms
from mert_jax.teachers import fitted_file, kmeans, mel_rvq, random_projection

Figures = list[dict[str, Any]]  # of each codebook on one split, see `_figures`
CHUNK = 4096  # frames encoded at a time
LINE = "{name:<9}{size:>5} codes, {dead:>4} unused, perplexity {perplexity:.1f}, error {error:.1%}"


class Fitted(NamedTuple):
    """A fitted teacher: arrays, settings of their sizes, features [n, F] of waves that it was
    fitted to, those of the train split, and a function that measures codebooks on features."""

    tensors: Mapping[str, np.ndarray]
    settings: dict[str, Any]
    features: Callable[[jax.Array], Any]
    frames: Any
    measure: Callable[[Any], Figures]


def fit(teacher: str, sampler: Sampler, output: str, iterations: int, **sizes: int) -> dict:
    """Fit `teacher`, write its file and report into `output`, and return the report.

    `sizes` replace default settings. Raises UserError for too little music or a wrong `output`.
    """
    check_writable(output)
    file = os.path.join(output, fitted_file.FILE)
    if os.path.exists(file) and (other := fitted_file.read_header(file)["teacher"]) != teacher:
        raise UserError(f"{file} holds teacher {other!r}; remove it, or give another --output")
    started = time.monotonic()
    fitted = FITTERS[teacher](sampler, iterations, **sizes)
    figures = {"train": fitted.measure(fitted.frames)}
    if sampler.has_validation:
        figures["validation"] = fitted.measure(sampler.draw("validation", fitted.features))
    drawn = {"seed": sampler.seed, "fingerprint": sampler.metadata["fingerprint"]}
    settings = fitted.settings | drawn
    report = {
        "teacher": teacher,
        "settings": settings,
        "frames": {split: sampler.available(split) for split in figures},
        "iterations": iterations,
        "seconds": round(time.monotonic() - started, 1),
        "figures": figures,
    }
    fitted_file.write_fitted(output, teacher, fitted.tensors, settings)
    with atomic_write(os.path.join(output, "report.json"), replace=True) as path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    for split, books in figures.items():
        for book in books:
            print(f"{split:<11}{LINE.format(**book)}")
    return report


def check_writable(output: str) -> None:
    """Raise UserError before minutes of fitting if `output` cannot be written."""
    if "://" in output:
        raise UserError(f"--output={output}: give a directory of a local disk, and copy it later")
    path = Path(output).absolute()
    existing = next(x for x in (path, *path.parents) if x.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write {output}: {existing} is not a writable directory")


def fit_kmeans(sampler: Sampler, iterations: int, **sizes: int) -> Fitted:
    """Cluster log-mel and chroma frames."""
    settings = kmeans.SETTINGS | sizes
    sizes = {"log_mel": settings["mel_size"], "chroma": settings["chroma_size"]}
    sampler.check(max(sizes.values()))
    features = functools.partial(kmeans.features, kmeans.filters(settings), hop=settings["hop"])
    frames, tensors = sampler.draw("train", features), {}
    for k, (x, (name, size)) in enumerate(zip(frames, sizes.items(), strict=True)):
        tensors[f"{name}_centres"] = clusters.fit(x, size, [sampler.seed, k], iterations, name)

    def measure(x: tuple[np.ndarray, ...]) -> Figures:
        variances = [each.var(0, dtype=np.float64).sum() for each in x]
        return _figures(sizes, functools.partial(kmeans.encode, tensors), x, variances)

    return Fitted(tensors, settings, features, frames, measure)


def fit_mel_rvq(sampler: Sampler, iterations: int, **sizes: int) -> Fitted:
    """Fit normalisation, then projection and codebook of one level after another."""
    settings = mel_rvq.SETTINGS | sizes
    if (dim := settings["dim"]) > settings["n_mels"]:
        raise UserError(f"dim {dim} is more than the {settings['n_mels']} mel bands; lower it")
    sampler.check(settings["size"])
    filters = mel_rvq.filters(settings)["mel_filters"]
    features = functools.partial(spectrograms.log_mel, filters=filters, hop=settings["hop"])
    frames = sampler.draw("train", features)
    tensors, levels = _statistics(frames), []
    residual = _standardise(frames, tensors)
    sizes = {f"level {k}": settings["size"] for k in range(settings["books"])}
    for k, (name, size) in enumerate(sizes.items()):
        projection = principal_columns(residual, dim)
        vectors = residual @ projection
        codebook = clusters.fit(vectors, size, [sampler.seed, k], iterations, name)
        level = {"projections": projection[None], "codebooks": codebook[None]}
        codes, _ = _encode(functools.partial(mel_rvq.encode, level), residual)
        residual = residual - codebook[codes[:, 0]] @ projection.T
        levels.append(level)
    tensors |= jax.tree.map(lambda *x: np.concatenate(x), *levels)

    def measure(x: np.ndarray) -> Figures:
        x = _standardise(x, tensors)
        variances = [x.var(0, dtype=np.float64).sum()] * len(sizes)
        return _figures(sizes, functools.partial(mel_rvq.encode, tensors), x, variances)

    return Fitted(tensors, settings, features, frames, measure)


def fit_random_projection(sampler: Sampler, iterations: int) -> Fitted:
    """Compute the mean and deviation of each mel band; `iterations` is not used."""
    settings = dict(n_mels=128, n_fft=2048, hop=HOP_LENGTH)
    sampler.check(1)
    filters = random_projection.make(**settings).params["mel_filters"]
    features = functools.partial(spectrograms.log_mel, filters=filters, hop=HOP_LENGTH)
    frames = sampler.draw("train", features)
    return Fitted(_statistics(frames), settings, features, frames, lambda x: [])


FITTERS = dict(kmeans=fit_kmeans, mel_rvq=fit_mel_rvq, random_projection=fit_random_projection)


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


def _statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    moments = {"mean": x.mean(0, dtype=np.float64), "std": x.std(0, dtype=np.float64)}
    return {name: values.astype(np.float32) for name, values in moments.items()}


def _standardise(x: np.ndarray, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    mean, std = tensors["mean"][None], tensors["std"][None]
    return np.asarray(spectrograms.standardise(jnp.asarray(x), mean, std))


def _encode(function: Callable[[Any], Any], x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes and squared errors [n, K] of arrays [n, F]; `function` encodes one row."""
    by_chunks = jax.jit(lambda x: jax.lax.map(function, x, batch_size=CHUNK))
    return jax.tree.map(np.asarray, by_chunks(x))


def _figures(
    sizes: Mapping[str, int], function: Callable[[Any], Any], x: Any, variances: Iterable[float]
) -> Figures:
    """For each codebook: name, size, perplexity of its codes, error (fraction of the variance left
    after it), number of dead codes, never used, and counts of codes, most frequent first."""
    (codes, squares), books = _encode(function, x), []
    for k, ((name, size), variance) in enumerate(zip(sizes.items(), variances, strict=True)):
        counts = np.sort(np.bincount(codes[:, k], minlength=size))[::-1]
        error = float(squares[:, k].mean(dtype=np.float64) / max(variance, 1e-12))
        used, dead = float(perplexity(counts)), int((counts == 0).sum())
        figures = dict(perplexity=used, error=error, dead=dead, counts=counts.tolist())
        books.append(dict(name=name, size=size) | figures)
    return books
