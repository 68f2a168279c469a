"""The acoustic teacher: codes of an RVQ-VAE, EnCodec at 24 kHz (arXiv 2210.13438)."""

from typing import Any

import jax
import jax.numpy as jnp

from mert_jax.constants import HOP_LENGTH
from mert_jax.errors import UserError
from mert_jax.models import encodec as codec
from mert_jax.models import quantize
from mert_jax.teachers import encodec_checkpoint
from mert_jax.teachers.teacher import Teacher

# 0.51 s. Measured with a fitted codec on two sets of music: of the codes in a crop's first 0.2 s,
# about half are the whole track's if the crop is all that is heard, over 99 % with this before it.
CONTEXT = 38 * HOP_LENGTH


def encoder(params: Any) -> codec.Encoder:
    """The network of encoder parameters, its sizes read from their shapes."""
    first, last = (params["encoder"][name]["conv"]["bias"] for name in ("conv_in", "conv_out"))
    return codec.Encoder(filters=first.shape[0], dim=last.shape[0])


def apply(params: Any, wave: jax.Array) -> jax.Array:
    """Codes int32[B, ceil(N / 320), K] of `wave` [B, N], as if the recording began there."""
    wave = wave.astype(jnp.float32)
    latents = encoder(params).apply({"params": params["encoder"]}, wave)
    return quantize.residual_encode(latents, params["codebooks"])[0]


def make(*, checkpoint: str | None = None, books: int = 0, context: int = CONTEXT) -> Teacher:
    """The first `books` codebooks (0: 8, or all where there are fewer) of an EnCodec: the
    official file, a Hugging Face directory or what `fit_teacher` wrote.

    `context` is the samples that training puts before a clip (see `CONTEXT`). Raises UserError for
    a checkpoint that is no whole EnCodec for 24 kHz or has fewer books, and for a context that is
    no multiple of 320.
    """
    if not checkpoint:
        raise UserError(
            "teacher 'rvq_vae' needs checkpoint=PATH: EnCodec's encodec_24khz-d7cc33bc.th, a "
            "Hugging Face EnCodec directory, or your own of python -m mert_jax.fit_teacher "
            "--teacher=rvq_vae --data=DIR --output=DIR"
        )
    if context < 0 or context % HOP_LENGTH:
        raise UserError(f"context={context}; it must be a multiple of {HOP_LENGTH}")
    params = encodec_checkpoint.read_encodec(checkpoint)
    found = len(params["codebooks"])
    if not 0 <= books <= found:
        raise UserError(f"books={books}, and {checkpoint} has {found} codebooks")
    codebooks = params["codebooks"][: books or 8]
    return Teacher(
        apply, {"encoder": params["encoder"], "codebooks": codebooks}, codebooks.shape[1], context
    )
