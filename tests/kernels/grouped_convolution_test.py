"""The grouped convolution against its plain definition."""

import functools

import jax
import numpy as np
import pytest

from mert_jax.kernels.grouped_convolution import grouped_convolution, grouped_convolution_plain


@pytest.mark.parametrize("taps", [1, 6, 7, 40])
@pytest.mark.parametrize("groups", [1, 3])
def test_value_and_gradients(taps, groups):
    width, frames = 12, 20
    keys = jax.random.split(jax.random.key(0), 3)
    x, gradient = (jax.random.normal(key, (2, frames, width)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (taps, width // groups, width))

    def value_and_gradients(function):
        y, pull = jax.vjp(functools.partial(function, groups=groups), x, kernel)
        return y, *pull(gradient)

    actual = value_and_gradients(grouped_convolution)
    plain = value_and_gradients(grouped_convolution_plain)
    for a, b in zip(actual, plain, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
