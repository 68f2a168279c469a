"""The first group norm, from moments of a wave, against the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mert_jax.extraction.group_norm import Moments
from mert_jax.kernels.first_layer import normed_convolution_plain
from mert_jax.kernels.numerics import EPSILON

TAPS, STRIDE, CHANNELS = 10, 5, 6


def parts(samples: int, level: float, offset: float):
    rng = np.random.default_rng(samples)
    wave = (level * rng.normal(size=samples).cumsum() / 10 + offset).astype(np.float32)
    kernel = rng.normal(size=(TAPS, CHANNELS)).astype(np.float32)
    scale, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    return wave, kernel, scale, bias


def norm_of(wave, kernel, scale, bias, normalised, cuts=()):
    moments = Moments(kernel, STRIDE, scale, bias, normalised)
    for block in np.split(wave, sorted(cuts)):
        moments.add(block)
    return moments.norm()


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(TAPS, 700),
    level=st.sampled_from([0.0, 1e-4, 0.1]),
    offset=st.sampled_from([0.0, 0.05]),
    normalised=st.booleans(),
    cuts=st.lists(st.integers(0, 700), max_size=4),
)
def test_the_norm_is_that_of_the_whole_wave(samples, level, offset, normalised, cuts):
    wave, kernel, scale, bias = parts(samples, level, offset)
    norm = norm_of(wave, kernel, scale, bias, normalised, [min(c, samples) for c in cuts])
    heard = wave.astype(np.float64)
    if normalised:
        heard = (heard - heard.mean()) / np.sqrt(heard.var() + 1e-7)
    convolved = np.lib.stride_tricks.sliding_window_view(heard, TAPS)[::STRIDE] @ kernel
    expected = (convolved - convolved.mean(0)) / np.sqrt(convolved.var(0) + EPSILON) * scale + bias
    scaled = (wave - norm.mean) * norm.scale
    convolved = np.lib.stride_tricks.sliding_window_view(scaled, TAPS)[::STRIDE] @ kernel
    normed = convolved * norm.factor + norm.shift
    np.testing.assert_allclose(normed, expected, atol=2e-3 if offset and not level else 2e-4)


def test_the_norm_is_that_of_the_student():
    wave, kernel, scale, bias = parts(4_000, 0.1, 0.0)
    norm = norm_of(wave, kernel, scale, bias, False)
    expected = normed_convolution_plain(wave[None], kernel, scale, bias, STRIDE)[0]
    convolved = np.lib.stride_tricks.sliding_window_view(wave, TAPS)[::STRIDE] @ kernel
    np.testing.assert_allclose(convolved * norm.factor + norm.shift, expected, atol=1e-5)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 3), (399, 400)])
def test_blocks_do_not_matter(cuts):
    wave, kernel, scale, bias = parts(401, 0.1, 0.01)
    at_once, cut = (norm_of(wave, kernel, scale, bias, True, c) for c in ((), cuts))
    np.testing.assert_allclose(at_once.factor, cut.factor, rtol=1e-6)
    np.testing.assert_allclose(at_once.shift, cut.shift, rtol=1e-6)
