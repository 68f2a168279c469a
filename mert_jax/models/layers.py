"""Initialisers, dense layer, norm and dropout of the student's modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer, normal, variance_scaling

from mert_jax.kernels.dropout import apply_dropout, hash_bits
from mert_jax.kernels.numerics import EPSILON, full_precision

Array = jax.Array

conv_init = variance_scaling(2.0, "fan_in", "normal")
fan_in_uniform = variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in))
encoder_init = normal(0.02)


def logical(init: Initializer, *axes: str | None) -> Initializer:
    """Return `init` for a parameter whose axes are named, for `sharding.RULES`."""
    return nn.with_logical_partitioning(init, axes)


def linear(features: int, fan_in: int, dtype: Any, name: str) -> nn.Dense:
    """Make a dense layer with torch's default initialisation.

    The official code keeps it outside the encoder: weight and bias uniform within 1/sqrt(fan_in).
    """

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    kernel_init = logical(fan_in_uniform, "embed", None)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


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
