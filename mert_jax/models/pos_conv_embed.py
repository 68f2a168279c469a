"""Positional embedding by a wide grouped convolution over neighbouring frames.

Shapes: B clips, T frames, D width, k taps, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal

from mert_jax.kernels.gelu import gelu
from mert_jax.kernels.grouped_convolution import grouped_convolution
from mert_jax.sharding import on_each_shard

Array = jax.Array


class PosConvEmbed(nn.Module):
    """gelu(convolution(x, g v / |v|) + bias), weight norm over each tap: [B, T, D] -> [B, T, D]."""

    kernel: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        v_init = normal((4 / (self.kernel * width)) ** 0.5)
        shape = (self.kernel, width // self.groups, width)
        # replicated on every device: the norm of a sharded weight would depend on the mesh
        v = self.param("weight_v", v_init, shape)
        g = self.param("weight_g", lambda _: jnp.linalg.norm(v, axis=(1, 2)))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        weight = v * (g[:, None, None] / jnp.linalg.norm(v, axis=(1, 2), keepdims=True))
        convolve = functools.partial(grouped_convolution, groups=self.groups)
        # not left to XLA: with the batch and `tensor` both split, it made the gradient of a grouped
        # convolution's kernel too large by the number of devices (jax 0.10 on CPUs)
        y = on_each_shard(convolve, x.astype(self.dtype), weight.astype(self.dtype))
        return gelu(y + bias.astype(self.dtype)[None, None, :])
