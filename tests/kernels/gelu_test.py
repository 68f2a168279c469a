"""GELU and its stored slope against the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.kernels.gelu import gelu, gelu_plain


def test_the_plain_definition_is_the_exact_gelu():
    x = jnp.linspace(-9, 9, 1001)
    np.testing.assert_allclose(gelu_plain(x), jax.nn.gelu(x, approximate=False), atol=5e-7)


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize(("dtype", "places"), [(jnp.bfloat16, 8), (jnp.float32, 24)])
def test_value_and_gradient_are_within_rounding(dtype, places, store):
    x = jnp.linspace(-9, 9, 20_001).astype(dtype)
    value, pull = jax.vjp(lambda x: gelu(x, store), x)
    (slope,) = pull(jnp.ones_like(x))
    assert value.dtype == slope.dtype == dtype
    wide = x.astype(jnp.float32)
    slopes = jax.vmap(jax.grad(gelu_plain))(wide)
    for actual, plain in zip((value, slope), (gelu_plain(wide), slopes), strict=True):
        # half a unit in the last place, and erf's own error
        bound = np.abs(plain) / 2**places + 1e-6
        assert (np.abs(actual.astype(jnp.float32) - plain) <= bound).all()
