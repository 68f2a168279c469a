"""Residual codes and k-means against their definitions in numpy, and against scikit-learn."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from mert_jax.models import quantize


def _residual_encode(x: np.ndarray, codebooks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, squares = [], []
    for codebook in codebooks:
        distances = np.square(x[..., None, :] - codebook).sum(-1)
        codes.append(distances.argmin(-1))
        x = x - codebook[codes[-1]]
        squares.append(np.square(x).sum(-1))
    return np.stack(codes, -1), np.stack(squares, -1)


def test_residual_encode_is_its_definition():
    rng = np.random.default_rng(0)
    # whole numbers: distances are exact, so that ties are ties
    x = rng.integers(-9, 9, (2, 50, 3)).astype(np.float32)
    codebooks = rng.integers(-5, 5, (4, 16, 3)).astype(np.float32)
    codes, squares = quantize.residual_encode(jnp.asarray(x), jnp.asarray(codebooks))
    expected_codes, expected_squares = _residual_encode(x, codebooks)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(squares, expected_squares)


def test_residual_decode_gives_back_all_but_the_residual():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 5)).astype(np.float32)
    codebooks = rng.normal(size=(3, 32, 5)).astype(np.float32)
    codes, squares = quantize.residual_encode(jnp.asarray(x), jnp.asarray(codebooks))
    decoded = quantize.residual_decode(codes, jnp.asarray(codebooks))
    np.testing.assert_allclose(np.square(x - decoded).sum(-1), squares[:, -1], rtol=1e-4)


def test_kmeans_step_is_lloyds():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    centres = np.concatenate([x[:6], np.full((1, 4), 99, np.float32)])
    chunks = jnp.asarray(x.reshape(3, 100, 4))
    found, counts, squares = quantize.kmeans_step(chunks, jnp.asarray(centres))
    distances = np.square(x[:, None] - centres).sum(-1)
    np.testing.assert_array_equal(counts, np.bincount(distances.argmin(1), minlength=7))
    np.testing.assert_allclose(squares.reshape(-1), distances.min(1), atol=1e-5)
    np.testing.assert_array_equal(found[6], centres[6])  # no vectors: it stays
    means = [x[distances.argmin(1) == v].mean(0) for v in range(6)]
    np.testing.assert_allclose(found[:6], means, atol=1e-5)


def test_kmeans_steps_end_where_sklearn_does():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2000, 8)).astype(np.float32)
    centres = jnp.asarray(x[:20])
    step, errors = jax.jit(quantize.kmeans_step), []
    for _ in range(100):
        centres, _, squares = step(jnp.asarray(x.reshape(4, 500, 8)), centres)
        errors.append(float(squares.sum()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    expected = KMeans(20, init=x[:20], n_init=1, max_iter=100, tol=0).fit(x)
    np.testing.assert_allclose(errors[-1], expected.inertia_, rtol=1e-3)
