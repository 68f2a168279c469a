"""GELU in half precision, and the numbers that dropout draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import layers

exact = lambda x: jax.nn.gelu(x, approximate=False)


def test_gelu_is_exact_in_float32():
    x = jnp.linspace(-9, 9, 1001)
    np.testing.assert_array_equal(layers.gelu(x), exact(x))


def test_gelu_in_bfloat16_is_within_its_rounding():
    x = jnp.linspace(-9, 9, 20_001).astype(jnp.bfloat16)
    value, pull = jax.vjp(layers.gelu, x)
    (slope,) = pull(jnp.ones_like(x))
    assert value.dtype == slope.dtype == jnp.bfloat16
    wide = x.astype(jnp.float32)
    for ours, of, error in (
        (value, exact(wide), 3.3e-5),
        (slope, jax.vmap(jax.grad(exact))(wide), 1.4e-4),
    ):
        # half a unit in the last of eight places, and the fit's own error
        bound = np.abs(of) / 256 + error
        assert (np.abs(ours.astype(jnp.float32) - of) <= bound).all()


def kept(seed, shape, rate):
    return np.asarray(layers.keep(layers.random_words(jax.random.key(seed), shape), rate))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_dropout_keeps_its_share_of_every_row_column_and_array(rate):
    shape = (4, 3, 400, 500)
    mask = kept(0, shape, rate)
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - 1 + rate) < 4 * sigma / mask.size**0.5
    for axis, number in ((3, 500), (2, 400)):
        # as widely spread as independent draws are
        z = (mask.mean(axis) - 1 + rate) * number**0.5 / sigma
        assert abs(z.std() - 1) < 0.05
        assert abs(z).max() < 6


def test_dropout_is_independent_of_its_neighbours_and_of_other_keys():
    rate, shape = 0.2, (600, 800)
    mask = kept(0, shape, rate).astype(float) - 1 + rate
    other = kept(1, shape, rate).astype(float) - 1 + rate
    products = {
        "rows": mask[1:] * mask[:-1],
        "columns": mask[:, 1:] * mask[:, :-1],
        # sums of row and column words would be tied four by four
        "squares": mask[1:, 1:] * mask[:-1, :-1] * mask[1:, :-1] * mask[:-1, 1:],
        "keys": mask * other,
    }
    for name, product in products.items():
        assert abs(product.mean()) < 4.5 * product.std() / product.size**0.5, name
