"""The teacher of MuQ: a residual quantiser of normalised log-mel frames, with linear projections.

Shapes: B clips, N samples, F = 128 mel bands, K codebooks of V rows of d dimensions.
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
NAME = "mel_rvq"
# tencent-ailab/MuQ, `muq_model.py` (arXiv 2501.01108), where a code spans four frames of 10 ms;
# here it spans one of the student's frames, 75 a second.
SETTINGS = dict(books=8, size=1024, dim=16, n_mels=128, n_fft=2048, hop=HOP_LENGTH)


def encode(params: Any, features: Array) -> tuple[Array, Array]:
    """Return codes int32 [..., K] of `features` [..., F], and the residual's square [..., K].

    Each level projects the residual of the last one and subtracts the nearest row, projected back
    (tencent-ailab/MuQ, `rvq.py`, where nearest is by angle, not Euclidean).
    """
    # the projections have orthonormal columns: the row nearest in d dimensions is nearest in F too
    pair = params["codebooks"], params["projections"]
    codebooks = jnp.einsum("kvd,kfd->kvf", *pair, precision=jax.lax.Precision.HIGHEST)
    return quantize.residual_encode(features, codebooks)


def apply(params: Any, wave: Array, *, hop: int) -> Array:
    """Return codes int32[B, N // hop + 1, K] of `wave` [B, N]."""
    log_mel = spectrograms.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    # over the dataset and band by band; MuQ has one mean and one deviation for all bands
    mean, std = params["mean"][None, None], params["std"][None, None]
    return encode(params, spectrograms.standardise(log_mel, mean, std))[0]


def filters(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of `params` that follow from the settings alone."""
    n_fft, n_mels = settings["n_fft"], settings["n_mels"]
    return {"mel_filters": spectrograms.mel_filters(SAMPLE_RATE, n_fft, n_mels)}


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a fitted file's arrays."""
    num_codebooks, bands, dim = settings["books"], settings["n_mels"], settings["dim"]
    projections, codebooks = (num_codebooks, bands, dim), (num_codebooks, settings["size"], dim)
    return dict(mean=(bands,), std=(bands,), projections=projections, codebooks=codebooks)


def make(*, checkpoint: str | None = None, books: int | None = None) -> Teacher:
    """Make the teacher that `fit_teacher` wrote to `checkpoint`, or its first `books` codebooks."""
    tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
    most = settings["books"]
    books = most if books is None else books
    if not 1 <= books <= most:
        raise UserError(f"{NAME}: books={books}, but {checkpoint} has {most}; take 1 to {most}")
    tensors |= {key: tensors[key][:books] for key in ("projections", "codebooks")}
    bound = functools.partial(apply, hop=settings["hop"])
    return Teacher(bound, filters(settings) | tensors, settings["size"])
