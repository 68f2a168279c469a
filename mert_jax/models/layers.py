"""What the student's modules have in common: precision, initialisers, norm, GELU, dropout.

Shapes: B clips, T frames, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn.initializers import Initializer, normal, variance_scaling

Array = jax.Array
EPSILON = 1e-5  # of every norm; flax's own default is 1e-6

conv_init = variance_scaling(2.0, "fan_in", "normal")
fan_in_uniform = variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-1/sqrt(fan_in))
encoder_init = normal(0.02)


def full_precision(dtype: Any) -> Any:
    """The dtype of norms, softmax, heads and losses: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gelu(x: Array, fitted: bool = False, keep: bool = True) -> Array:
    """x times the normal distribution function of x; `fitted`, within 3e-5 of it, for TPUs, which
    spend as long on an erf as on the matrix product before it.

    `keep` its value and slope for the backward pass, in the dtype of `x`; without, XLA may evaluate
    them again in front of each matrix product that reads them.
    """
    return _value_and_slope(x, fitted)[0]


def _gelu_forward(x: Array, fitted: bool, keep: bool) -> tuple[Array, Array]:
    value_and_slope = _value_and_slope(x, fitted)
    return jax.lax.optimization_barrier(value_and_slope) if keep else value_and_slope


def _value_and_slope(x: Array, fitted: bool) -> tuple[Array, Array]:
    full = x.astype(full_precision(x.dtype))
    value, slope = (_fitted_gelu if fitted else _exact_gelu)(full)
    return value.astype(x.dtype), slope.astype(x.dtype)


def _exact_gelu(x: Array) -> tuple[Array, Array]:
    probability = (1 + jax.lax.erf(x * 0.5**0.5)) / 2
    density = jnp.exp(jnp.square(x) / -2) * (2 * np.pi) ** -0.5
    return x * probability, probability + x * density


def _fitted_gelu(x: Array) -> tuple[Array, Array]:
    near = jnp.clip(x, -4.5, 4.5)  # beyond, the polynomial turns back
    square = jnp.square(near)
    # fitted to the greatest errors of the function and, at a quarter of the weight, of its slope
    a, b, c = 0.7976, 0.03695, -3.44e-4
    tanh = jnp.tanh(near * (a + square * (b + square * c)))
    density = (1 - jnp.square(tanh)) * (a + square * (3 * b + square * (5 * c)))
    return x * (1 + tanh) / 2, (1 + tanh + x * density) / 2


gelu.defvjp(_gelu_forward, lambda fitted, keep, slope, gradient: (gradient * slope,))


def logical(init: Initializer, *axes: str | None) -> Initializer:
    """`init`, whose parameter names its axes for `sharding.RULES`."""
    return nn.with_logical_partitioning(init, axes)


def linear(features: int, fan_in: int, dtype: Any, name: str) -> nn.Dense:
    """A dense layer with torch's default initialisation, which the official code keeps outside the
    encoder: weight and bias uniform within 1/sqrt(fan_in)."""

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    kernel_init = logical(fan_in_uniform, "embed", None)
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


class Norm(nn.Module):
    """Layer norm in full precision, returned in the dtype of the computation."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # mean and mean square in one pass (flax's default), for which XLA needs no pass at all:
        # they are a part of the product before
        norm = nn.LayerNorm(EPSILON, dtype=full_precision(self.dtype), name="norm")
        nn.share_scope(self, norm)
        return norm(x).astype(self.dtype)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the elements of [..., R, C] and scales up the rest, unless
    `deterministic`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        if deterministic or not self.rate:
            return x
        return dropped(x, random_words(self.make_rng("dropout"), x.shape), self.rate)


def random_words(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Random uint32 for each row and each column of an array [..., R, C]: [..., R] and [C]."""
    rows, columns = jax.random.split(key)
    bits = lambda key, shape: jax.random.bits(key, shape, jnp.uint32)
    return bits(rows, shape[:-1]), bits(columns, shape[-1:])


def keep(words: tuple[Array, Array], rate: float) -> Array:
    """Which elements of an array survive dropout at `rate`, from its `random_words`; bool.

    An element's number is the product of its row's word, made odd, and its column's, modulo 2**32,
    whose high bits are what counts (M. Dietzfelbinger et al., 1997, "multiply-shift" hashing). On a
    TPU, whose vector unit has no generator, dropout by `jax.random` cost as much as the attention.
    """
    rows, columns = words
    odd = (rows | np.uint32(1))[..., None]
    number = odd * jnp.expand_dims(columns, tuple(range(rows.ndim)))
    return number >= np.uint32(round(rate * 2**32))


def dropped(x: Array, words: tuple[Array, Array], rate: float) -> Array:
    """`x` [..., R, C] after dropout at `rate`, by its `random_words`.

    A product and not a `where`: XLA's TPU compiler does not fuse a select into the matrix products
    before and after it, and an attention layer took 1.8 times as long.
    """
    full = full_precision(x.dtype)
    scale = keep(words, rate).astype(full) / (1 - rate)
    return (x.astype(full) * scale).astype(x.dtype)
