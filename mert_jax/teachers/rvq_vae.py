"""The acoustic teacher: codes of an RVQ-VAE, EnCodec at 24 kHz (arXiv 2210.13438)."""

from typing import Any

import jax
import jax.numpy as jnp

from mert_jax.constants import HOP_LENGTH
from mert_jax.errors import UserError
from mert_jax.models import encodec, quantize
from mert_jax.teachers import encodec_checkpoint
from mert_jax.teachers.fitted_file import COMMAND
from mert_jax.teachers.teacher import Teacher

# 0.51 s. Measured with a fitted codec on two sets of music: without context, about half of the
# codes in a crop's first 0.2 s equal those of the whole track, with this much over 99 %.
CONTEXT = 38 * HOP_LENGTH


def encoder(params: Any) -> encodec.Encoder:
    """Return the network of these parameters, its sizes read from their shapes."""
    conv_in, conv_out = (params["encoder"][name]["conv"] for name in ("conv_in", "conv_out"))
    return encodec.Encoder(filters=len(conv_in["bias"]), dim=len(conv_out["bias"]))


def apply(params: Any, wave: jax.Array) -> jax.Array:
    """Return codes int32[B, ceil(N / 320), K] of `wave` [B, N], the start of a recording."""
    wave = wave.astype(jnp.float32)
    latents = encoder(params).apply({"params": params["encoder"]}, wave)
    return quantize.residual_encode(latents, params["codebooks"])[0]


def make(*, checkpoint: str | None = None, books: int = 0, context: int = CONTEXT) -> Teacher:
    """Make the teacher of an EnCodec's first `books` codebooks (0: at most 8).

    Raises UserError for a checkpoint with fewer, and a `context` that is not a multiple of 320.
    """
    if not checkpoint:
        raise UserError(
            "rvq_vae needs checkpoint=PATH: EnCodec's encodec_24khz-d7cc33bc.th, a Hugging Face "
            f"EnCodec directory, or your own codec, the --output of {COMMAND} --teacher=rvq_vae"
        )
    if context < 0 or context % HOP_LENGTH:
        raise UserError(f"context={context}; it must be a multiple of {HOP_LENGTH}")
    params = encodec_checkpoint.read_encodec(checkpoint)
    most = len(params["codebooks"])
    if not 0 <= books <= most:
        raise UserError(f"books={books}, but {checkpoint} has {most} codebooks; take 1 to {most}")
    params = {"encoder": params["encoder"], "codebooks": params["codebooks"][: books or 8]}
    return Teacher(apply, params, params["codebooks"].shape[1], context)
