"""GELU whose backward pass multiplies by a slope that the forward pass computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.kernels.numerics import full_precision

Array = jax.Array


def gelu_plain(x: Array) -> Array:
    """Return x times the normal distribution function of x."""
    return x * (1 + jax.lax.erf(x * 0.5**0.5)) / 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: Array, store: bool = True) -> Array:
    """Return `gelu_plain` of `x`, computed in full precision.

    With `store`, value and slope are stored for the backward pass in the dtype of `x`; without, XLA
    may compute them again in front of each matrix product that reads them.
    """
    return _value_and_slope(x)[0]


def _value_and_slope(x: Array) -> tuple[Array, Array]:
    full = x.astype(full_precision(x.dtype))
    probability = (1 + jax.lax.erf(full * 0.5**0.5)) / 2
    density = jnp.exp(jnp.square(full) / -2) * (2 * np.pi) ** -0.5
    value, slope = full * probability, probability + full * density
    return value.astype(x.dtype), slope.astype(x.dtype)


def _forward(x: Array, store: bool) -> tuple[Array, Array]:
    value_and_slope = _value_and_slope(x)
    # TPU: without the barrier an erf, as slow as the matrix product before it, is computed twice
    return jax.lax.optimization_barrier(value_and_slope) if store else value_and_slope


def _backward(store: bool, slope: Array, gradient: Array) -> tuple[Array]:
    return (gradient * slope,)


gelu.defvjp(_forward, _backward)
