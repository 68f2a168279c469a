"""Dropout against its plain definition, and the statistics of its hashed mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.kernels import dropout


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradient(dtype):
    x, gradient = jax.random.normal(jax.random.key(0), (2, 4, 30, 50), dtype)
    bits = dropout.hash_bits(jax.random.key(1), x.shape)
    actual, pull = jax.vjp(lambda x: dropout.apply_dropout(x, bits, 0.3), x)
    plain, pull_plain = jax.vjp(lambda x: dropout.dropout_plain(x, bits, 0.3), x)
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7  # two roundings to 8 bits
    pairs = (actual, plain), (pull(gradient)[0], pull_plain(gradient)[0])
    for a, b in pairs:
        assert a.dtype == dtype
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance)


def mask_of(seed, shape, rate):
    return np.asarray(dropout.dropout_mask(dropout.hash_bits(jax.random.key(seed), shape), rate))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_keeps_its_share_of_every_row_column_and_array(rate):
    shape = (4, 3, 400, 500)
    mask = mask_of(0, shape, rate)
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - 1 + rate) < 4 * sigma / mask.size**0.5
    for axis, number in ((3, 500), (2, 400)):
        # as widely spread as independent draws are
        z = (mask.mean(axis) - 1 + rate) * number**0.5 / sigma
        assert abs(z.std() - 1) < 0.05
        assert abs(z).max() < 6


def test_dropout_is_independent_of_its_neighbours_and_of_other_keys():
    rate, shape = 0.2, (600, 800)
    mask = mask_of(0, shape, rate).astype(float) - 1 + rate
    other = mask_of(1, shape, rate).astype(float) - 1 + rate
    products = {
        "rows": mask[1:] * mask[:-1],
        "columns": mask[:, 1:] * mask[:, :-1],
        # sums of row and column words would be tied four by four
        "squares": mask[1:, 1:] * mask[:-1, :-1] * mask[1:, :-1] * mask[:-1, 1:],
        "keys": mask * other,
    }
    for name, product in products.items():
        assert abs(product.mean()) < 4.5 * product.std() / product.size**0.5, name
