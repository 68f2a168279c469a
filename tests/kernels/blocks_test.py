"""A wave in blocks of frames against the wave at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.kernels import blocks
from mert_jax.kernels.convolution import convolution_plain


@pytest.mark.parametrize("samples", [10, 24, 25, 29, 51, 100])
def test_value_and_gradient(samples, monkeypatch):
    monkeypatch.setattr(blocks, "FRAMES", 4)
    wave = jax.random.normal(jax.random.key(0), (2, samples))
    kernel = jax.random.normal(jax.random.key(1), (10, 1, 3))

    def encode(wave):
        return convolution_plain(wave[..., None], kernel, 5)

    def in_blocks(wave):
        return blocks.map_blocks(encode, wave, 5, 10)

    plain, pull_plain = jax.vjp(encode, wave)
    actual, pull = jax.vjp(in_blocks, wave)
    np.testing.assert_allclose(actual, plain, atol=1e-5)
    gradient = jnp.cos(plain)
    np.testing.assert_allclose(pull(gradient)[0], pull_plain(gradient)[0], atol=1e-5)
