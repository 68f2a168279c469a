"""Residual codes against their definition, written in numpy."""

import jax.numpy as jnp
import numpy as np

from mert_jax import quantize


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
