"""Dropout from hashed row and column numbers instead of one random number an element.

TPU: its vector unit has no random generator, and dropout by `jax.random` cost as much as attention.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.kernels.numerics import full_precision

Array = jax.Array
Bits = tuple[Array, Array]  # uint32 of rows [..., R] and of columns [C]


def hash_bits(key: Array, shape: tuple[int, ...]) -> Bits:
    """Draw random uint32 for the rows and columns of an array [..., R, C]: [..., R] and [C]."""
    rows, columns = jax.random.split(key)
    return (
        jax.random.bits(rows, shape[:-1], jnp.uint32),
        jax.random.bits(columns, shape[-1:], jnp.uint32),
    )


def dropout_mask(bits: Bits, rate: float) -> Array:
    """Return the elements that survive dropout at `rate`: bool [..., R, C].

    An element's number is the product modulo 2**32 of its row's bits, made odd, and its column's;
    the comparison reads the high bits (M. Dietzfelbinger et al., 1997, "multiply-shift" hashing).
    """
    rows, columns = bits
    odd = (rows | np.uint32(1))[..., None]
    number = odd * jnp.expand_dims(columns, tuple(range(rows.ndim)))
    return number >= np.uint32(round(rate * 2**32))


def dropout_plain(x: Array, bits: Bits, rate: float) -> Array:
    """Zero a fraction `rate` of `x` [..., R, C] and divide the rest by 1 - `rate`."""
    return jnp.where(dropout_mask(bits, rate), x / (1 - rate), 0)


def apply_dropout(x: Array, bits: Bits | None, rate: float) -> Array:
    """Return `dropout_plain` of `x` [..., R, C]; `x` itself without `bits`."""
    if bits is None:
        return x
    full = full_precision(x.dtype)
    # TPU: a product, because XLA does not fuse a select into the matrix products before and after
    # it; an attention layer took 1.8 times as long
    scale = dropout_mask(bits, rate).astype(full) / (1 - rate)
    return (x.astype(full) * scale).astype(x.dtype)
