"""The teacher of MuQ: a residual quantiser of normalised log-mel frames, with linear projections.

Shapes: B clips, N samples, T frames, F = 128 mel bands, K books of V rows of d dimensions.
"""

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

Array = jax.Array
NAME = "mel_rvq"
SAMPLE_RATE = 24_000
# 8 books of 1024, 16 dimensions, 128 bands, 2048 samples: tencent-ailab/MuQ, `muq_model.py` (arXiv
# 2501.01108). There a code spans four frames of 10 ms; here one of 75 frames a second, the
# student's.
SETTINGS = dict(books=8, size=1024, dim=16, n_mels=128, n_fft=2048, hop=320)


def features(params: Any, wave: Array, *, hop: int) -> Array:
    """Log-mel [B, N // hop + 1, F] of `wave` [B, N], normalised band by band over the dataset.

    MuQ has one mean and one deviation for all bands.
    """
    log_mel = spectrograms.log_mel(wave.astype(jnp.float32), params["mel_filters"], hop)
    return spectrograms.standardise(log_mel, params["mean"][None, None], params["std"][None, None])


def encode(params: Any, features: Array) -> tuple[Array, Array]:
    """Codes int32 [..., K] of `features` [..., F], and the residual's square [..., K] after each.

    Every book projects what the ones before it left over to d dimensions, takes the nearest row
    and subtracts it, projected back (tencent-ailab/MuQ, `rvq.py`; nearest is Euclidean here, not
    by angle). Projections have orthonormal columns, so that the nearest row in d dimensions is the
    nearest of all rows in F: codebooks of rows in F dimensions that lie in a plane.
    """
    codebooks = jnp.einsum(
        "kvd,kfd->kvf",
        params["codebooks"],
        params["projections"],
        precision=jax.lax.Precision.HIGHEST,
    )
    return quantize.residual_encode(features, codebooks)


def apply(params: Any, wave: Array, *, hop: int) -> Array:
    """Codes int32[B, N // hop + 1, K] of `wave` [B, N]."""
    return encode(params, features(params, wave, hop=hop))[0]


def filters(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `params` that follow from the settings alone."""
    return {
        "mel_filters": spectrograms.mel_filters(SAMPLE_RATE, settings["n_fft"], settings["n_mels"])
    }


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The arrays of a fitted file and their shapes."""
    books, bands = settings["books"], settings["n_mels"]
    return {
        "mean": (bands,),
        "std": (bands,),
        "projections": (books, bands, settings["dim"]),
        "codebooks": (books, settings["size"], settings["dim"]),
    }


def make(*, checkpoint: str | None = None, books: int | None = None) -> Teacher:
    """The teacher fitted by `fit_teacher` into `checkpoint`; `books` takes the first ones only.

    Raises UserError when the file has fewer.
    """
    tensors, settings = fitted_file.load(checkpoint, NAME, shapes)
    books = settings["books"] if books is None else books
    if not 1 <= books <= settings["books"]:
        raise UserError(
            f"teacher {NAME!r}: books={books}, and {checkpoint} has {settings['books']}; take 1 to "
            f"{settings['books']}"
        )
    for key in ("projections", "codebooks"):
        tensors[key] = tensors[key][:books]
    bound = functools.partial(apply, hop=settings["hop"])
    return Teacher(bound, filters(settings) | tensors, settings["size"])
