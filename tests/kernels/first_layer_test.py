"""The folded first layer against its plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.kernels import first_layer

CHANNELS = 24


def inputs(samples, length, level=0.1, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    # low notes: neighbouring samples hardly differ, and statistics cancel
    steps = jax.random.normal(keys[0], (2, samples))
    wave = level * jnp.cumsum(steps, 1) / samples**0.5
    kernel = 0.4 * jax.random.normal(keys[1], (length, CHANNELS))
    return wave, kernel, *(1 + jax.random.normal(key, (CHANNELS,)) for key in keys[2:])


def value_and_gradients(function, arrays, stride):
    @jax.jit
    def both(*arrays):
        value, pull = jax.vjp(lambda *arrays: function(*arrays, stride), *arrays)
        gradient = jax.random.normal(jax.random.key(9), value.shape, value.dtype)
        return value, *pull(gradient)[1:]

    return both(*arrays)


@pytest.mark.parametrize(
    ("samples", "length", "stride"), [(4_000, 10, 5), (4_003, 10, 5), (3_001, 8, 3), (2_000, 4, 4)]
)
@pytest.mark.parametrize("level", [0.0, 1e-3, 1.0])
def test_folding_the_norm_changes_nothing(samples, length, stride, level):
    arrays = inputs(samples, length, level)
    actual = value_and_gradients(first_layer.normed_convolution_folded, arrays, stride)
    plain = value_and_gradients(first_layer.normed_convolution_plain, arrays, stride)
    for a, b in zip(actual, plain, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 2e-4 * np.linalg.norm(b)


def test_patches_are_the_samples_under_each_frame():
    wave = jnp.arange(2 * 23.0).reshape(2, 23)
    actual = first_layer.patches(wave, 10, 5)
    expected = np.stack([wave[:, i : i + 10] for i in (0, 5, 10)], 1)
    np.testing.assert_array_equal(actual, expected)
