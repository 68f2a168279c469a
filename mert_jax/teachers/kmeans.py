"""The acoustic teacher of MERT v0: k-means on log-mel and on chroma.

Shapes: B clips, N samples, T frames, F = 229 mel bands or 264 chroma classes, V centres.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.models import quantize, spectrograms
from mert_jax.teachers import fitted_file
from mert_jax.teachers.teacher import Teacher

Array = jax.Array
NAME = "kmeans"
SAMPLE_RATE = 24_000
# Features and sizes are those of arXiv 2306.00107 (300 centres on log-mel of 229 bands, 200 on
# chroma of 264). No file of yizhilll/MERT has the rest. The wave at unit variance and librosa's
# chroma are how the same authors extract it elsewhere (MARBLE-Benchmark,
# `benchmark/models/handcrafted/extract_handcrafted_features.py`); there at 16 kHz by transforms of
# 512 samples, in which two semitones below 500 Hz are one bin. Ours have 2048, as many as librosa's
# default.
SETTINGS = dict(mel_size=300, chroma_size=200, n_mels=229, n_chroma=264, n_fft=2048, hop=320)


def features(params: Any, wave: Array, *, hop: int) -> tuple[Array, Array]:
    """Log-mel [B, T, 229] and chroma [B, T, 264] of `wave` [B, N], T = N // hop + 1.

    Without a clip's level, which the student's group norm takes away too.
    """
    wave = spectrograms.normalise(wave.astype(jnp.float32))
    return (
        spectrograms.log_mel(wave, params["mel_filters"], hop),
        spectrograms.chroma(wave, params["chroma_filters"], hop),
    )


def encode(params: Any, features: tuple[Array, Array]) -> tuple[Array, Array]:
    """Codes int32 [..., 2] of log-mel [..., 229] and chroma [..., 264], and squared distances
    [..., 2] to their centres."""
    centres = params["log_mel_centres"], params["chroma_centres"]
    found = [quantize.residual_encode(x, c[None]) for x, c in zip(features, centres, strict=True)]
    codes, squares = zip(*found, strict=True)
    return jnp.concatenate(codes, -1), jnp.concatenate(squares, -1)


def apply(params: Any, wave: Array, *, hop: int) -> Array:
    """Codes int32[B, N // hop + 1, 2] of `wave` [B, N]: book 0 is log-mel, book 1 chroma."""
    return encode(params, features(params, wave, hop=hop))[0]


def filters(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `params` that follow from the settings alone."""
    n_fft = settings["n_fft"]
    return {
        "mel_filters": spectrograms.mel_filters(SAMPLE_RATE, n_fft, settings["n_mels"]),
        "chroma_filters": spectrograms.chroma_filters(SAMPLE_RATE, n_fft, settings["n_chroma"]),
    }


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The arrays of a fitted file and their shapes."""
    return {
        "log_mel_centres": (settings["mel_size"], settings["n_mels"]),
        "chroma_centres": (settings["chroma_size"], settings["n_chroma"]),
    }


def make(*, checkpoint: str | None = None) -> Teacher:
    """The teacher fitted by `fit_teacher` into `checkpoint`; its size is that of the larger book.

    Book 1 (chroma) uses the first 200 of the 300 classes only.
    """
    tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
    size = max(settings["mel_size"], settings["chroma_size"])
    bound = functools.partial(apply, hop=settings["hop"])
    return Teacher(bound, filters(settings) | tensors, size)
