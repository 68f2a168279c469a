"""The random-projection teacher of BEST-RQ, as MusicFM uses it on music; it needs no training."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.errors import UserError
from mert_jax.models import quantize, spectrograms
from mert_jax.teachers import fitted_file
from mert_jax.teachers.teacher import Teacher

NAME = "random_projection"
SAMPLE_RATE = 24_000


def apply(params: Any, wave: jax.Array, *, hop: int) -> jax.Array:
    """Codes int32[B, N // hop + 1, K] of `wave` [B, N].

    Normalised log-mel frames are projected by each of K fixed random matrices, and the code is the
    nearest row of a fixed codebook of unit vectors (Chiu et al., arXiv 2202.01855, eq. 1).
    """
    # rows have unit length, so that normalising the vectors too would not change the nearest one
    vectors = project(params, features(params, wave, hop=hop))
    codes = jax.vmap(quantize.nearest)(vectors, params["codebooks"])
    return codes.transpose(2, 1, 0)


def features(params: Any, wave: jax.Array, *, hop: int) -> jax.Array:
    """Log-mel [B, N // hop + 1, F] of `wave` [B, N], normalised band by band.

    Over the dataset where `params` have its mean and std (MusicFM has one of each for all bands);
    else over the clip: the student's group norm takes the level of a clip and of its bands away, so
    that no code may depend on them.
    """
    log_mel = spectrograms.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    if "mean" in params:
        return spectrograms.standardise(
            log_mel, params["mean"][None, None], params["std"][None, None]
        )
    mean, std = log_mel.mean(1, keepdims=True), log_mel.std(1, keepdims=True)
    return spectrograms.standardise(log_mel, mean, std)


def project(params: Any, features: jax.Array) -> jax.Array:
    """`features` [B, T, F] by each random matrix: [K, T, B, d]."""
    return jnp.einsum(
        "btf,kfd->ktbd", features, params["projections"], precision=jax.lax.Precision.HIGHEST
    )


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The arrays of a fitted file and their shapes."""
    return {"mean": (settings["n_mels"],), "std": (settings["n_mels"],)}


def make(
    *,
    seed: int = 0,
    books: int = 8,
    size: int = 1024,
    dim: int = 16,
    n_mels: int = 128,
    n_fft: int = 2048,
    hop: int = 320,
    checkpoint: str | None = None,
) -> Teacher:
    """`books` independent codebooks of `size` random unit vectors, drawn from `seed`.

    Projections are Xavier normal, codebooks standard normal and normalised (arXiv 2202.01855);
    128 mel bands, a 2048-sample transform and 16 dimensions are MusicFM's (minzwon/musicfm).
    `checkpoint`, written by `fit_teacher`, has the dataset's mean and std; UserError when it is of
    other features.
    """
    tensors = {}
    if checkpoint:
        tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
        for key, value in dict(n_mels=n_mels, n_fft=n_fft, hop=hop).items():
            if settings.get(key) != value:
                raise UserError(
                    f"{checkpoint} was fitted with {key}={settings.get(key)}, and the teacher has "
                    f"{key}={value}; set {key}={settings.get(key)} or leave the checkpoint out"
                )
    rng = np.random.default_rng(seed)
    projections = rng.normal(0, (2 / (n_mels + dim)) ** 0.5, (books, n_mels, dim))
    codebooks = rng.normal(size=(books, size, dim))
    codebooks /= np.linalg.norm(codebooks, axis=-1, keepdims=True)
    params = {
        "mel_filters": spectrograms.mel_filters(SAMPLE_RATE, n_fft, n_mels),
        "projections": projections.astype(np.float32),
        "codebooks": codebooks.astype(np.float32),
    }
    return Teacher(functools.partial(apply, hop=hop), params | tensors, size)
