"""Nearest codeword of a codebook. Shapes: K codebooks, V codes each, d dimensions."""

import jax
import jax.numpy as jnp

Array = jax.Array


def nearest(x: Array, codebook: Array) -> Array:
    """Index of the row of `codebook` [V, d] nearest to each vector of `x` [..., d], int32 [...].

    Highest matmul precision: on TPU the default would flip nearly tied codes. The first of equally
    near rows wins.
    """
    # |e|^2 - 2 x.e as one product, [x, 1] . [-2 e, |e|^2]: arithmetic beside it would slow argmin
    rows = jnp.concatenate([-2 * codebook, jnp.sum(jnp.square(codebook), -1, keepdims=True)], -1)
    vectors = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    distances = jnp.einsum("...d,vd->...v", vectors, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(distances, -1).astype(jnp.int32)
