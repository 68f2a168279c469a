"""Transforms by products against the plain ones by FFT, and those against numpy's."""

import jax
import numpy as np
import pytest

from mert_jax.kernels import dft


# rows of the first half, across its end, below zero, and a whole period; an odd size
@pytest.mark.parametrize(("hop", "points"), [(8, 30), (7, 15)])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (2, 6), (-2, 2), (-1, 6)])
def test_rows_of_spectra(hop, points, first, last):
    blocks = np.random.default_rng(0).normal(size=(2, hop * points)).astype(np.float32)
    lines = np.arange(first * points, last * points) % (hop * points)
    exact = np.fft.fft(blocks)[:, lines].reshape(2, last - first, points)
    for form in (dft.spectrum_rows_plain, dft.spectrum_rows_by_products, dft.spectrum_rows):
        real, imag = form(blocks, hop, first, last)
        np.testing.assert_allclose(real + 1j * imag, exact, atol=2e-5)


@pytest.mark.parametrize(("start", "stop"), [(0, 30), (4, 21)])
def test_points_of_inverse_transforms(start, stop):
    real, imag = np.random.default_rng(0).normal(size=(2, 2, 5, 30)).astype(np.float32)
    exact = np.fft.ifft(real + 1j * imag)[..., start:stop]
    for form in (dft.inverse_plain, dft.inverse_by_products, dft.inverse):
        ours = form((real, imag), start, stop)
        np.testing.assert_allclose(ours[0] + 1j * ours[1], exact, atol=1e-6)


@pytest.mark.parametrize(("platform", "has_fft"), [("cpu", True), ("tpu", False)])
def test_a_tpu_uses_no_fft(platform, has_fft):
    def there_and_back(blocks: jax.Array) -> dft.Complex:
        return dft.inverse(dft.spectrum_rows(blocks, 8, 0, 3), 0, 20)

    traced = jax.jit(there_and_back).trace(jax.ShapeDtypeStruct((2, 240), np.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("fft" in text) == has_fft
