"""GELU, exact and fitted, and the numbers that dropout draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.models import layers

exact = lambda x: jax.nn.gelu(x, approximate=False)


def test_gelu_is_exact_unless_asked_otherwise():
    x = jnp.linspace(-9, 9, 1001)
    np.testing.assert_allclose(layers.gelu(x), exact(x), atol=5e-7)
    assert np.abs(layers.gelu(x, fitted=True) - exact(x)).max() > 1e-6


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("dtype", "places"), [(jnp.bfloat16, 8), (jnp.float32, 24)])
@pytest.mark.parametrize(
    ("fitted", "errors"), [(False, (1e-6, 1e-6)), (True, (3.3e-5, 1.4e-4))], ids=["exact", "fitted"]
)
def test_gelu_and_its_slope_are_within_rounding(fitted, errors, dtype, places, keep):
    x = jnp.linspace(-9, 9, 20_001).astype(dtype)
    value, pull = jax.vjp(lambda x: layers.gelu(x, fitted, keep), x)
    (slope,) = pull(jnp.ones_like(x))
    assert value.dtype == slope.dtype == dtype
    wide = x.astype(jnp.float32)
    slopes = jax.vmap(jax.grad(exact))(wide)
    for ours, of, error in zip((value, slope), (exact(wide), slopes), errors, strict=True):
        # half a unit in the last place, and the formula's own error
        bound = np.abs(of) / 2**places + error
        assert (np.abs(ours.astype(jnp.float32) - of) <= bound).all()


def test_norm_of_numbers_far_from_zero():
    """Mean and mean square in one pass lose what the square of mean over spread says."""
    x = 10 + jax.random.normal(jax.random.key(0), (20, 768))
    norm = layers.Norm(jnp.float32)
    ours = norm.apply(norm.init(jax.random.key(1), x), x)
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + layers.EPSILON)
    np.testing.assert_allclose(ours, exact, atol=1e-4)


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
