"""Initialisers, dense layer, norm, dropout, attention and positional embedding of the student.

Shapes: B clips, T frames, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer, normal, variance_scaling

from mert_jax.kernels.attention import attention
from mert_jax.kernels.dropout import apply_dropout, hash_bits
from mert_jax.kernels.gelu import gelu
from mert_jax.kernels.grouped_convolution import grouped_convolution
from mert_jax.kernels.numerics import EPSILON, full_precision
from mert_jax.sharding import on_each_shard

Array = jax.Array

conv_init = variance_scaling(2.0, "fan_in", "normal")
fan_in_uniform = variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in))
encoder_init = normal(0.02)


def logical(init: Initializer, *axes: str | None) -> Initializer:
    """Return `init` for a parameter whose axes are named, for `sharding.RULES`."""
    return nn.with_logical_partitioning(init, axes)


def linear(features: int, fan_in: int, dtype: Any, name: str) -> nn.Dense:
    """Make a dense layer with torch's initialisation: all uniform within 1/sqrt(fan_in)."""

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    kernel_init = logical(fan_in_uniform, "embed", None)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


def dense(features: int, axes: tuple[str, str], dtype: Any, name: str) -> nn.Dense:
    """Make a dense layer of the encoder, with its kernel's axes named."""
    kernel_init = logical(encoder_init, *axes)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


class Norm(nn.Module):
    """Layer norm in full precision, returned in the dtype of the computation."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # flax's default takes mean and mean square in one pass, which XLA fuses into the product
        # before it
        norm = nn.LayerNorm(EPSILON, dtype=full_precision(self.dtype), name="norm")
        nn.share_scope(self, norm)
        return norm(x).astype(self.dtype)


class Dropout(nn.Module):
    """Zero a fraction `rate` of [..., R, C] and scale up the rest, unless `deterministic`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        if deterministic or not self.rate:
            return x
        return apply_dropout(x, hash_bits(self.make_rng("dropout"), x.shape), self.rate)


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
            y = dense(width, ("embed", "heads"), self.dtype, name)(x)
            return y.reshape(clips, frames, self.num_heads, width // self.num_heads)

        query, key, value = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
        bits = None
        if self.dropout and not deterministic:
            bits = hash_bits(self.make_rng("dropout"), (clips, self.num_heads, frames, frames))
        y = attention(query, key, value, padding, bits, self.dropout)
        return dense(width, ("heads", "embed"), self.dtype, "out_proj")(y.reshape(x.shape))


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
