"""The strided convolution against its plain definition."""

import jax
import numpy as np
import pytest

from mert_jax.kernels.convolution import convolution, convolution_plain


@pytest.mark.parametrize(
    ("samples", "length", "stride"), [(41, 3, 2), (40, 2, 2), (52, 10, 5), (33, 8, 4), (30, 3, 5)]
)
def test_value_and_gradients(samples, length, stride):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, samples, 6))
    kernel = jax.random.normal(keys[1], (length, 6, 7))
    plain, pull_plain = jax.vjp(lambda *a: convolution_plain(*a, stride), x, kernel)
    actual, pull = jax.vjp(lambda *a: convolution(*a, stride), x, kernel)
    gradient = jax.random.normal(keys[2], plain.shape)
    pairs = zip((actual, *pull(gradient)), (plain, *pull_plain(gradient)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-5)
