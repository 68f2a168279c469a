"""The fast CQT equals its dense definition at every kind of length; librosa's does not."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import teachers
from mert_jax.errors import UserError
from mert_jax.kernels import dft
from mert_jax.teachers import cqt
from tests import cqt_definition

TEACHER = teachers.make("cqt")


def music(clips: int, samples: int, seed: int = 0) -> np.ndarray:
    """Decaying partials from 40 Hz to 4 kHz and a little noise, [clips, N]."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 24_000
    frequency = 40 * 100 ** rng.random((clips, 8, 1))
    partials = np.sin(2 * np.pi * frequency * t) * np.exp(-2 * ((t * 3) % 1))
    return (0.05 * partials.sum(1) + 0.01 * rng.normal(size=(clips, samples))).astype(np.float32)


def compute(wave: np.ndarray, teacher=TEACHER) -> np.ndarray:
    return np.asarray(jax.jit(teacher.apply)(teacher.params, jnp.asarray(wave)))


def compute_by_products(wave: np.ndarray, teacher=TEACHER) -> np.ndarray:
    """The CQT as it is computed on a TPU."""
    forms = dict(spectrum_rows=dft.spectrum_rows_by_products, inverse=dft.inverse_by_products)
    with mock.patch.multiple(dft, **forms):
        # a new function, because jit would take the one that it has traced already
        return np.asarray(jax.jit(lambda *args: teacher.apply(*args))(teacher.params, wave))


def relative_l2(ours, exact) -> float:
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


# shorter than a hop, odd, the recipes' clips, and longer than one block: overlap-save
@pytest.mark.parametrize("samples", [1, 319, 24_319, 122_880, 300_001])
def test_equals_the_definition(samples):
    wave = music(2 if samples < 50_000 else 1, samples)
    exact = cqt_definition.magnitudes(wave.astype(np.float64))
    ours = compute(wave)
    assert ours.shape == (len(wave), samples // 320 + 1, 336)
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()
    assert relative_l2(ours, exact) < 1e-5
    products = compute_by_products(wave)
    assert np.abs(products - exact).max() <= 1e-5 * np.abs(exact).max()
    assert relative_l2(products, ours) < 2e-6


def test_clicks_and_full_scale():
    wave = np.zeros((3, 24_000), np.float32)
    wave[0, [0, 12_001, -1]] = 1
    wave[1] = np.sign(np.sin(2 * np.pi * 100.3 / 24_000 * np.arange(24_000)))
    wave[2] = np.random.default_rng(0).uniform(-1, 1, 24_000)
    exact = cqt_definition.magnitudes(wave.astype(np.float64))
    for ours in (compute(wave), compute_by_products(wave)):
        assert max(map(relative_l2, ours, exact)) < 5e-6


# bins from 10 kHz on are wider than half the spectrum; hop 441 makes transforms of odd size
@pytest.mark.parametrize(
    ("n_bins", "bins_per_octave", "hop", "fmin"),
    [
        (100, 12, 320, 32.7),
        (40, 24, 256, 65.4),
        (20, 7, 441, 1_000.0),
        (3, 1, 160, 2_000.0),
        (1, 48, 320, 440.0),
        (1, 12, 320, 1_000.0),
        (5, 48, 320, 110.0),
    ],
)
def test_other_sizes(n_bins, bins_per_octave, hop, fmin):
    samples = 30_001
    teacher = teachers.make(
        "cqt", n_bins=n_bins, bins_per_octave=bins_per_octave, hop=hop, fmin=fmin
    )
    wave = music(1, samples)
    # only the ratio of the rate to fmin matters
    rate = 24_000 * cqt_definition.FMIN / fmin
    exact = cqt_definition.magnitudes(
        wave.astype(np.float64), n_bins, bins_per_octave, sample_rate=rate, hop=hop
    )
    ours = compute(wave, teacher)
    assert ours.shape == exact.shape == (1, samples // hop + 1, n_bins)
    assert relative_l2(ours, exact) < 1e-5
    assert teacher.size == n_bins
    assert relative_l2(compute_by_products(wave, teacher), exact) < 1e-5


@pytest.mark.parametrize(("platform", "has_fft"), [("cpu", True), ("tpu", False)])
def test_only_the_cpu_uses_an_fft(platform, has_fft):
    wave = jax.ShapeDtypeStruct((1, 24_000), jnp.float32)
    traced = jax.jit(TEACHER.apply).trace(TEACHER.params, wave)
    assert ("fft" in traced.lower(lowering_platforms=(platform,)).as_text()) == has_fft


def test_a_bfloat16_wave_is_computed_in_float32():
    wave = jnp.asarray(music(1, 8_000), jnp.bfloat16)
    ours = compute(wave)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, compute(wave.astype(jnp.float32)))


def test_the_gradient_is_finite_and_zero_for_silence():
    teacher = teachers.make("cqt", n_bins=36, bins_per_octave=12, fmin=100.0)
    wave = music(2, 4_000)
    wave[1] = 0
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(2, 4_000 // 320 + 1, 36)).astype(np.float32)
    loss = jax.jit(lambda wave: jnp.sum(weight * teacher.apply(teacher.params, wave)))
    gradient = np.asarray(jax.grad(loss)(wave))
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()
    direction = np.zeros_like(wave)
    direction[0] = music(1, 4_000, seed=2)[0]
    difference = (loss(wave + 1e-3 * direction) - loss(wave - 1e-3 * direction)) / 2e-3
    np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-2)


@pytest.mark.parametrize("bin_", [150, 250, 334, 335])
def test_a_kernels_spectrum_is_that_of_the_kernel(bin_):
    kernels, lengths, frequencies = cqt_definition.kernels(336, 48)
    kernel, length = kernels[bin_].astype(complex), lengths[bin_]
    n = np.arange(length) - (length + 1) // 2
    offset = np.linspace(-40 / length, 40 / length, 101)
    direct = np.exp(-2j * np.pi * np.outer(offset + frequencies[bin_] / 24_000, n)) @ kernel
    direct *= length**0.5
    # the sine is 1 at the wave's sample, half a sample after the centre of an odd window
    centre = np.exp(1j * np.pi * (length % 2) * offset)
    ours = cqt.kernel_spectrum(offset, length)
    assert np.abs(direct * centre.conj() - ours).max() < 1e-5 * np.abs(direct).max()


def test_silence_is_zero():
    assert compute(np.zeros((1, 8_000), np.float32)).max() == 0


def test_no_parameter_depends_on_the_length():
    shapes = {x.shape for x in jax.tree.leaves(TEACHER.params)}
    compute(music(1, 5_000))
    assert shapes == {x.shape for x in jax.tree.leaves(TEACHER.params)}
    assert sum(x.nbytes for x in jax.tree.leaves(TEACHER.params)) <= 40e6


def test_rows_are_independent():
    wave = music(3, 9_000)
    np.testing.assert_allclose(compute(wave)[1:2], compute(wave[1:2]), atol=1e-6)


@pytest.mark.slow
def test_librosas_recursive_downsampling_differs_by_a_percent():
    import librosa

    wave = music(1, 48_000)
    options = dict(hop_length=320, fmin=32.7, n_bins=336, bins_per_octave=48, sparsity=0)
    theirs = np.abs(librosa.cqt(wave[0], sr=24_000, **options))
    error = relative_l2(theirs.T, compute(wave)[0])
    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize(
    ("options", "message"), [(dict(n_bins=500), "n_bins"), (dict(hop=0), "above 0, not .*'hop': 0")]
)
def test_sizes_that_make_no_cqt_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        teachers.make("cqt", **options)
