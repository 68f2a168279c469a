"""Vector quantisation: nearest code, residual encoding and decoding, and a k-means step.

Shapes: K codebooks, V codes each, d dimensions, n vectors.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def nearest(x: Array, codebook: Array) -> Array:
    """Return the (first) row of `codebook` [V, d] nearest to each `x` [..., d], int32 [...]."""
    # argmin |x - e|^2 = argmin |e|^2 - 2 x.e, as one product [x, 1] . [-2 e, |e|^2]: arithmetic
    # after the product would slow argmin down. The default precision on TPUs would flip near ties.
    rows = jnp.concatenate([-2 * codebook, jnp.sum(jnp.square(codebook), -1, keepdims=True)], -1)
    vectors = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    distances = jnp.einsum("...d,vd->...v", vectors, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(distances, -1).astype(jnp.int32)


def residual_encode(x: Array, codebooks: Array) -> tuple[Array, Array]:
    """Return the codes int32 [..., K] of `x` [..., d], and the squared residual after each.

    Each of the `codebooks` [K, V, d] quantises the residual of those before it (arXiv 2210.13438,
    section 3.2).
    """

    def quantise(residual: Array, codebook: Array) -> tuple[Array, tuple[Array, Array]]:
        codes = nearest(residual, codebook)
        residual = residual - codebook[codes]
        return residual, (codes, jnp.sum(jnp.square(residual), -1))

    _, outputs = jax.lax.scan(quantise, x, codebooks)
    codes, squares = (jnp.moveaxis(each, 0, -1) for each in outputs)
    return codes, squares


def residual_decode(codes: Array, codebooks: Array) -> Array:
    """Return the sum of the rows of `codebooks` [K, V, d] at `codes` int [..., K]: [..., d]."""
    return sum(codebooks[k][codes[..., k]] for k in range(codebooks.shape[0]))


def kmeans_step(x: Array, centres: Array) -> tuple[Array, Array, Array]:
    """Make one step of Lloyd's algorithm on `x` [chunks, n, d], with memory for n * V distances.

    Return the new centres [V, d], their numbers of vectors int32 [V], and the squared distances
    [chunks, n] to the old `centres`. A centre without vectors stays.
    """
    size = centres.shape[0]

    def chunk(sums: Array, vectors: Array) -> tuple[Array, Array]:
        codes = nearest(vectors, centres)
        # not a scatter, whose order of additions on GPUs differs from run to run
        ones = jnp.concatenate([vectors, jnp.ones_like(vectors[:, :1])], -1)
        members = jax.nn.one_hot(codes, size, dtype=vectors.dtype)
        sums += jnp.einsum("nv,nd->vd", members, ones, precision=jax.lax.Precision.HIGHEST)
        return sums, jnp.sum(jnp.square(vectors - centres[codes]), -1)

    sums, squares = jax.lax.scan(chunk, jnp.zeros((size, x.shape[-1] + 1), x.dtype), x)
    counts = sums[:, -1:]
    means = jnp.where(counts > 0, sums[:, :-1] / jnp.maximum(counts, 1), centres)
    return means, counts[:, 0].astype(jnp.int32), squares
