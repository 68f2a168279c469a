"""The acoustic teacher: codes of an RVQ-VAE, EnCodec at 24 kHz (arXiv 2210.13438)."""

from typing import Any

import jax
import jax.numpy as jnp

from mert_jax import codec, encodec, quantize
from mert_jax.cli import UserError
from mert_jax.teachers import Teacher


def encoder(params: Any) -> codec.Encoder:
    """The network of encoder parameters, its sizes read from their shapes."""
    first, last = (params["encoder"][name]["conv"]["bias"] for name in ("conv_in", "conv_out"))
    return codec.Encoder(filters=first.shape[0], dim=last.shape[0])


def apply(params: Any, wave: jax.Array) -> jax.Array:
    """Codes int32[B, ceil(N / 320), K] of `wave` [B, N], as if the recording began there."""
    wave = wave.astype(jnp.float32)
    latents = encoder(params).apply({"params": params["encoder"]}, wave)
    return quantize.residual_encode(latents, params["codebooks"])[0]


def make(*, checkpoint: str | None = None, books: int | None = None) -> Teacher:
    """The first `books` codebooks (default: 8, or all where there are fewer) of an EnCodec: the
    official file, a Hugging Face directory or what `fit_teacher` wrote.

    Raises UserError for a checkpoint that is no whole EnCodec for 24 kHz or has fewer books.
    """
    if not checkpoint:
        raise UserError(
            "teacher 'rvq_vae' needs checkpoint=PATH: EnCodec's encodec_24khz-d7cc33bc.th, a "
            "Hugging Face EnCodec directory, or your own of python -m mert_jax.fit_teacher "
            "--teacher=rvq_vae --data=DIR --output=DIR"
        )
    params = encodec.read(checkpoint)
    found = len(params["codebooks"])
    if books is not None and not 1 <= books <= found:
        raise UserError(f"books={books}, and {checkpoint} has {found} codebooks")
    codebooks = params["codebooks"][: books or 8]
    return Teacher(
        apply, {"encoder": params["encoder"], "codebooks": codebooks}, codebooks.shape[1]
    )
