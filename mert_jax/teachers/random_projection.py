"""The random-projection teacher of BEST-RQ, as MusicFM uses it on music; it needs no training.

Shapes: B clips, N samples, T frames, F mel bands, K codebooks of V unit vectors of d dimensions.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.models import quantize, spectrograms
from mert_jax.teachers import fitted_file
from mert_jax.teachers.teacher import Teacher

Array = jax.Array
NAME = "random_projection"


def apply(params: Any, wave: Array, *, hop: int) -> Array:
    """Return codes int32[B, N // hop + 1, K] of `wave` [B, N] (Chiu, arXiv 2202.01855, eq. 1).

    Random matrices project normalised log-mel frames; a code is the nearest row of a codebook.
    """
    log_mel = spectrograms.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    if "mean" in params:  # of the dataset (MusicFM has one mean and one deviation for all bands)
        mean, std = params["mean"][None, None], params["std"][None, None]
    else:
        # of the clip: the student's group norm removes the level of a clip and of its bands, so
        # codes must not depend on them
        mean, std = log_mel.mean(1, keepdims=True), log_mel.std(1, keepdims=True)
    pair = spectrograms.standardise(log_mel, mean, std), params["projections"]
    # rows have unit length, so normalising the projected vectors would not change the nearest one
    vectors = jnp.einsum("btf,kfd->ktbd", *pair, precision=jax.lax.Precision.HIGHEST)
    return jax.vmap(quantize.nearest)(vectors, params["codebooks"]).transpose(2, 1, 0)


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a fitted file's arrays."""
    return {"mean": (settings["n_mels"],), "std": (settings["n_mels"],)}


def make(
    *,
    seed: int = 0,
    books: int = 8,
    size: int = 1024,
    dim: int = 16,
    n_mels: int = 128,
    n_fft: int = 2048,
    hop: int = HOP_LENGTH,
    checkpoint: str | None = None,
) -> Teacher:
    """Make `books` independent codebooks of `size` random unit vectors, drawn from `seed`.

    The other sizes are MusicFM's (minzwon/musicfm). `checkpoint` holds the dataset's mean and std.
    Raises UserError if `fit_teacher` made it with other `n_mels`, `n_fft` or `hop`.
    """
    tensors = {}
    if checkpoint:
        tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
        for key, value in dict(n_mels=n_mels, n_fft=n_fft, hop=hop).items():
            if (fitted := settings.get(key)) != value:
                problem = f"{checkpoint} was fitted with {key}={fitted}, and the teacher has"
                raise UserError(f"{problem} {key}={value}; set {key}={fitted} or leave it out")
    # projections are Xavier normal, codebooks normalised standard normal (arXiv 2202.01855)
    rng = np.random.default_rng(seed)
    projections = rng.normal(0, (2 / (n_mels + dim)) ** 0.5, (books, n_mels, dim))
    codebooks = rng.normal(size=(books, size, dim))
    codebooks /= np.linalg.norm(codebooks, axis=-1, keepdims=True)
    drawn = dict(projections=projections.astype(np.float32), codebooks=codebooks.astype(np.float32))
    filters = {"mel_filters": spectrograms.mel_filters(SAMPLE_RATE, n_fft, n_mels)}
    return Teacher(functools.partial(apply, hop=hop), filters | drawn | tensors, size)
