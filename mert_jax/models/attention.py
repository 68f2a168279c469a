"""Multi-head self-attention.

Shapes: B clips, T frames, D width, H heads, d width of a head.
"""

from typing import Any

import jax
from flax import linen as nn

from mert_jax.kernels.attention import attention
from mert_jax.kernels.dropout import hash_bits
from mert_jax.models.layers import encoder_init, logical

Array = jax.Array


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of H heads, projected: [B, T, D] -> [B, T, D].

    `padding` [B, T] is True at frames that are not attended to.
    """

    num_heads: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, padding: Array | None, deterministic: bool) -> Array:
        clips, frames, width = x.shape

        def project(name: str) -> Array:
            kernel_init = logical(encoder_init, "embed", "heads")
            y = nn.Dense(width, dtype=self.dtype, kernel_init=kernel_init, name=name)(x)
            return y.reshape(clips, frames, self.num_heads, width // self.num_heads)

        query, key, value = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
        bits = None
        if self.dropout and not deterministic:
            bits = hash_bits(self.make_rng("dropout"), (clips, self.num_heads, frames, frames))
        y = attention(query, key, value, padding, bits, self.dropout)
        kernel_init = logical(encoder_init, "heads", "embed")
        return nn.Dense(width, dtype=self.dtype, kernel_init=kernel_init, name="out_proj")(
            y.reshape(x.shape)
        )
