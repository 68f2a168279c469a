"""The random-projection teacher of BEST-RQ, as MusicFM uses it on music; it needs no training."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax import audio, quantize
from mert_jax.teachers import Teacher

SAMPLE_RATE = 24_000


def apply(params: Any, wave: jax.Array, *, hop: int) -> jax.Array:
    """Codes int32[B, N // hop + 1, K] of `wave` [B, N].

    Normalised log-mel frames are projected by each of K fixed random matrices, and the code is the
    nearest row of a fixed codebook of unit vectors (Chiu et al., arXiv 2202.01855, eq. 1). Each
    band is normalised over the clip, not over the dataset as in MusicFM: the student's group norm
    takes the level of a clip and of its bands away, so that no code may depend on them.
    """
    log_mel = audio.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    mean, std = log_mel.mean(1, keepdims=True), log_mel.std(1, keepdims=True)
    # a band that never changes (silence, above a lossy codec's cut-off) says nothing: it becomes 0
    normalised = jnp.where(std > 1e-3, (log_mel - mean) / jnp.maximum(std, 1e-3), 0)
    vectors = jnp.einsum(
        "btf,kfd->ktbd", normalised, params["projections"], precision=jax.lax.Precision.HIGHEST
    )
    # rows have unit length, so that normalising the vectors too would not change the nearest one
    codes = jax.vmap(quantize.nearest)(vectors, params["codebooks"])
    return codes.transpose(2, 1, 0)


def make(
    *,
    seed: int = 0,
    books: int = 8,
    size: int = 1024,
    dim: int = 16,
    n_mels: int = 128,
    n_fft: int = 2048,
    hop: int = 320,
) -> Teacher:
    """`books` independent codebooks of `size` random unit vectors, drawn from `seed`.

    Projections are Xavier normal, codebooks standard normal and normalised (arXiv 2202.01855);
    128 mel bands, a 2048-sample transform and 16 dimensions are MusicFM's (minzwon/musicfm).
    """
    rng = np.random.default_rng(seed)
    projections = rng.normal(0, (2 / (n_mels + dim)) ** 0.5, (books, n_mels, dim))
    codebooks = rng.normal(size=(books, size, dim))
    codebooks /= np.linalg.norm(codebooks, axis=-1, keepdims=True)
    params = {
        "mel_filters": audio.mel_filters(SAMPLE_RATE, n_fft, n_mels),
        "projections": projections.astype(np.float32),
        "codebooks": codebooks.astype(np.float32),
    }
    return Teacher(functools.partial(apply, hop=hop), params, size)
