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


def features(params: Any, wave: Array, *, hop: int) -> Array:
    """Return log-mel [B, N // hop + 1, F] of `wave` [B, N], each band normalised over the dataset.

    MuQ has one mean and one deviation for all bands.
    """
    log_mel = spectrograms.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    return spectrograms.standardise(log_mel, params["mean"][None, None], params["std"][None, None])


def encode(params: Any, features: Array) -> tuple[Array, Array]:
    """Return codes int32 [..., K] of `features` [..., F], and the residual's square [..., K].

    Each level projects the residual of the previous one to d dimensions and subtracts the nearest
    row, projected back (tencent-ailab/MuQ, `rvq.py`, where nearest is by angle, not Euclidean).
    """
    # the projections have orthonormal columns: the row nearest in d dimensions is nearest in F too
    codebooks = jnp.einsum(
        "kvd,kfd->kvf",
        params["codebooks"],
        params["projections"],
        precision=jax.lax.Precision.HIGHEST,
    )
    return quantize.residual_encode(features, codebooks)


def apply(params: Any, wave: Array, *, hop: int) -> Array:
    """Return codes int32[B, N // hop + 1, K] of `wave` [B, N]."""
    return encode(params, features(params, wave, hop=hop))[0]


def filters(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of `params` that follow from the settings alone."""
    n_fft, n_mels = settings["n_fft"], settings["n_mels"]
    return {"mel_filters": spectrograms.mel_filters(SAMPLE_RATE, n_fft, n_mels)}


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a fitted file's arrays."""
    num_codebooks, bands, dim = settings["books"], settings["n_mels"], settings["dim"]
    return {
        "mean": (bands,),
        "std": (bands,),
        "projections": (num_codebooks, bands, dim),
        "codebooks": (num_codebooks, settings["size"], dim),
    }


def make(*, checkpoint: str | None = None, books: int | None = None) -> Teacher:
    """Make the teacher that `fit_teacher` wrote to `checkpoint`, or its first `books` codebooks.

    Raises UserError if the file has fewer.
    """
    tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
    available = settings["books"]
    books = available if books is None else books
    if not 1 <= books <= available:
        raise UserError(
            f"teacher {NAME!r}: books={books}, but {checkpoint} has {available}; take 1 to "
            f"{available}"
        )
    tensors |= {key: tensors[key][:books] for key in ("projections", "codebooks")}
    bound = functools.partial(apply, hop=settings["hop"])
    return Teacher(bound, filters(settings) | tensors, settings["size"])
