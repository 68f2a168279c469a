"""The random-projection teacher of BEST-RQ, as MusicFM uses it on music; it needs no training."""

import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax import audio, quantize
from mert_jax.cli import UserError
from mert_jax.teachers import Teacher

SAMPLE_RATE = 24_000


def apply(params: Any, wave: jax.Array, *, hop: int) -> jax.Array:
    """Codes int32[B, N // hop + 1, K] of `wave` [B, N].

    Normalised log-mel frames are projected by each of K fixed random matrices, and the code is the
    nearest row of a fixed codebook of unit vectors (Chiu et al., arXiv 2202.01855, eq. 1).
    """
    log_mel = audio.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    if "mean" in params:
        mean, std = params["mean"][None, None], params["std"][None, None]
    else:
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
    checkpoint: str = "",
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
    `checkpoint` is a file of `save`, whose statistics normalise the log-mel of every clip, as in
    MusicFM; without one each clip is normalised by its own, and its codes say less of its timbre.
    Raises UserError for a file that is not there or has other bands.
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
    if checkpoint:
        params |= _load(checkpoint, n_mels, n_fft)
    return Teacher(functools.partial(apply, hop=hop), params, size)


def fit(teacher: Teacher, waves: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Mean and standard deviation f32[F] of the log-mel bands over `waves`, each f32[B, N]."""
    filters, hop = teacher.params["mel_filters"], teacher.apply.keywords["hop"]

    @jax.jit
    def moments(wave: jax.Array) -> jax.Array:
        log_mel = audio.log_mel(wave, filters, hop)
        return jnp.stack([log_mel.mean((0, 1)), jnp.square(log_mel).mean((0, 1))])

    first, second = np.mean([np.asarray(moments(wave), np.float64) for wave in waves], axis=0)
    std = np.sqrt(np.maximum(second - first**2, 0))
    return {"mean": first.astype(np.float32), "std": std.astype(np.float32)}


def save(path: str, teacher: Teacher, statistics: dict[str, np.ndarray]) -> None:
    """Write `statistics` as the file that `make(checkpoint=path)` reads, whole or not at all."""
    with open(path + ".tmp", "wb") as f:
        n_fft = 2 * (teacher.params["mel_filters"].shape[0] - 1)
        np.savez(f, n_fft=n_fft, **statistics)
    os.replace(path + ".tmp", path)


def _load(path: str, n_mels: int, n_fft: int) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            held = {name: file[name] for name in ("mean", "std", "n_fft")}
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path} holds no statistics of a random-projection teacher: {e}") from e
    if held["mean"].shape != (n_mels,) or int(held["n_fft"]) != n_fft:
        raise UserError(
            f"{path} has {held['mean'].size} mel bands of n_fft {held['n_fft']}, the teacher "
            f"{n_mels} of {n_fft}; set n_mels and n_fft to the file's or fit it again"
        )
    return {"mean": held["mean"], "std": held["std"]}
