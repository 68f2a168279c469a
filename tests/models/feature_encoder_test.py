"""The first convolution's two forms: equal in value and gradient, one for each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.models import feature_encoder

CHANNELS = 24


def inputs(samples, length, level=0.1, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    # low notes: neighbouring samples hardly differ, and statistics cancel
    steps = jax.random.normal(keys[0], (2, samples))
    wave = level * jnp.cumsum(steps, 1) / samples**0.5
    kernel = 0.4 * jax.random.normal(keys[1], (length, CHANNELS))
    return wave, kernel, *(1 + jax.random.normal(key, (CHANNELS,)) for key in keys[2:])


def value_and_gradients(function, arrays, stride):
    value, pull = jax.vjp(lambda *arrays: function(*arrays, stride), *arrays)
    gradient = jax.random.normal(jax.random.key(9), value.shape, value.dtype)
    return value, *pull(gradient)[1:]


@pytest.mark.parametrize(
    ("samples", "length", "stride"), [(4_000, 10, 5), (4_003, 10, 5), (3_001, 8, 3), (2_000, 4, 4)]
)
@pytest.mark.parametrize("level", [0.0, 1e-3, 1.0])
def test_folding_the_norm_changes_nothing(samples, length, stride, level):
    arrays = inputs(samples, length, level)
    ours = value_and_gradients(feature_encoder.folded, arrays, stride)
    exact = value_and_gradients(feature_encoder.two_pass, arrays, stride)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 2e-4 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("samples", "length", "stride"), [(41, 3, 2), (40, 2, 2), (52, 10, 5), (33, 8, 4), (30, 3, 5)]
)
def test_the_gradient_in_phases_is_the_convolution_s(samples, length, stride):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, samples, 6))
    kernel = jax.random.normal(keys[1], (length, 6, 7))
    convolve = lambda x, kernel: feature_encoder._convolution(x, kernel, stride)
    value, pull = jax.vjp(convolve, x, kernel)
    gradient = jax.random.normal(keys[2], value.shape)
    ours = jax.vjp(lambda *a: feature_encoder.convolution(*a, stride), x, kernel)[1](gradient)
    for found, exact in zip(ours, pull(gradient), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5)


def test_patches_are_the_samples_under_each_frame():
    wave = jnp.arange(2 * 23.0).reshape(2, 23)
    found = feature_encoder.patches(wave, 10, 5)
    expected = np.stack([wave[:, i : i + 10] for i in (0, 5, 10)], 1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 2), ("tpu", 1)])
def test_each_platform_has_its_form_alone(platform, convolutions):
    options = dict(
        conv_dim=8, kernels=(10, 3), strides=(5, 2), fitted_gelu=False, dtype=jnp.float32
    )
    small, wave = feature_encoder.FeatureEncoder(**options), jnp.zeros((1, 400))
    params = small.init(jax.random.key(0), wave)
    program = jax.jit(small.apply).trace(params, wave).lower(lowering_platforms=(platform,))
    assert program.as_text().count("stablehlo.convolution") == convolutions
