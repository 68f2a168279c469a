"""Nearest codeword of a codebook. Shapes: K codebooks, V codes each, d dimensions."""

import jax
import jax.numpy as jnp

Array = jax.Array


def nearest(x: Array, codebook: Array) -> Array:
    """Index of the row of `codebook` [V, d] nearest to each vector of `x` [..., d], int32 [...].

    Highest matmul precision: on TPU the default would flip nearly tied codes. The first of equally
    near rows wins.
    """
    dots = jnp.einsum("...d,vd->...v", x, codebook, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(codebook), -1)
    return jnp.argmin(norms.reshape((1,) * (x.ndim - 1) + (-1,)) - 2 * dots, -1).astype(jnp.int32)
