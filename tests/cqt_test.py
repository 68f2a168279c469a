"""The fast CQT against its dense definition, at every kind of length, and against librosa."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import teachers
from mert_jax.cli import UserError
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


def relative_l2(ours, exact) -> float:
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


# shorter than a hop, odd, the recipes' clips, and longer than one block of the overlap-save
@pytest.mark.parametrize("samples", [1, 319, 8_000, 24_319, 122_880, 300_001])
def test_it_is_the_definition(samples):
    wave = music(2 if samples < 50_000 else 1, samples)
    exact = cqt_definition.magnitudes(wave.astype(np.float64))
    ours = compute(wave)
    assert ours.shape == (len(wave), samples // 320 + 1, 336)
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()
    assert relative_l2(ours, exact) < 1e-5


def test_other_sizes():
    teacher = teachers.make("cqt", n_bins=84, bins_per_octave=12)
    wave = music(1, 30_000)
    exact = cqt_definition.magnitudes(wave.astype(np.float64), 84, 12)
    assert relative_l2(compute(wave, teacher), exact) < 1e-5
    assert teacher.size == 84


@pytest.mark.parametrize("bin_", [150, 250, 334, 335])
def test_a_kernels_spectrum_is_that_of_the_kernel(bin_):
    made, lengths, frequencies = cqt_definition.kernels(336, 48)
    kernel, length = made[bin_].astype(complex), lengths[bin_]
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
    assert sum(x.size for x in jax.tree.leaves(TEACHER.params)) * 4 < 20e6


def test_rows_are_independent():
    wave = music(3, 9_000)
    np.testing.assert_allclose(compute(wave)[1:2], compute(wave[1:2]), atol=1e-6)


def test_librosa_agrees_to_a_percent_and_no_better():
    """Its recursive downsampling is why nnAudio's definition is computed here."""
    import librosa

    wave = music(1, 48_000)
    theirs = np.abs(
        librosa.cqt(
            wave[0],
            sr=24_000,
            hop_length=320,
            fmin=32.7,
            n_bins=336,
            bins_per_octave=48,
            sparsity=0,
        )
    )
    error = relative_l2(theirs.T, compute(wave)[0])
    assert 1e-3 < error < 2e-2


def test_a_bin_above_half_the_sample_rate():
    with pytest.raises(UserError, match="n_bins"):
        teachers.make("cqt", n_bins=500)
