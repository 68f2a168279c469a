"""The acoustic teacher of MERT v0: k-means on log-mel and on chroma.

Shapes: B clips, N samples, T = N // hop + 1 frames.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.models import quantize, spectrograms
from mert_jax.teachers import fitted_file
from mert_jax.teachers.teacher import Teacher

Array = jax.Array
NAME = "kmeans"
# Features and sizes are those of arXiv 2306.00107; the rest is not published. Unit variance of the
# wave and librosa's chroma follow the same authors (MARBLE-Benchmark,
# `benchmark/models/handcrafted/extract_handcrafted_features.py`), whose transforms of 512 samples
# at 16 kHz put two semitones below 500 Hz in one bin. 2048 is librosa's default.
SETTINGS = dict(mel_size=300, chroma_size=200, n_mels=229, n_chroma=264, n_fft=2048, hop=HOP_LENGTH)


def features(params: Any, wave: Array, *, hop: int) -> tuple[Array, Array]:
    """Return log-mel [B, T, 229] and chroma [B, T, 264] of `wave` [B, N], whatever its level."""
    # the student's group norm removes the level too
    wave = spectrograms.normalise(wave.astype(jnp.float32))
    log_mel = spectrograms.log_mel(wave, params["mel_filters"], hop)
    return log_mel, spectrograms.chroma(wave, params["chroma_filters"], hop)


def encode(params: Any, features: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return codes int32 and squared errors [..., 2] of log-mel [..., 229], chroma [..., 264]."""
    centres = params["log_mel_centres"], params["chroma_centres"]
    pairs = [quantize.residual_encode(x, c[None]) for x, c in zip(features, centres, strict=True)]
    codes, squares = zip(*pairs, strict=True)
    return jnp.concatenate(codes, -1), jnp.concatenate(squares, -1)


def apply(params: Any, wave: Array, *, hop: int) -> Array:
    """Return codes int32[B, T, 2] of `wave` [B, N]: of log-mel, and of chroma."""
    return encode(params, features(params, wave, hop=hop))[0]


def filters(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of `params` that follow from the settings alone."""
    n_fft, n_mels, n_chroma = (settings[name] for name in ("n_fft", "n_mels", "n_chroma"))
    mel = spectrograms.mel_filters(SAMPLE_RATE, n_fft, n_mels)
    chroma = spectrograms.chroma_filters(SAMPLE_RATE, n_fft, n_chroma)
    return dict(mel_filters=mel, chroma_filters=chroma)


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a fitted file's arrays."""
    mel = settings["mel_size"], settings["n_mels"]
    return dict(log_mel_centres=mel, chroma_centres=(settings["chroma_size"], settings["n_chroma"]))


def make(*, checkpoint: str | None = None) -> Teacher:
    """Make the teacher that `fit_teacher` wrote to `checkpoint`."""
    tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
    # of the larger codebook: codes of chroma take only the first 200 of 300
    size = max(settings["mel_size"], settings["chroma_size"])
    bound = functools.partial(apply, hop=settings["hop"])
    return Teacher(bound, filters(settings) | tensors, size)
