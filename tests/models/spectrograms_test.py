"""Log-mel and chroma against librosa's."""

import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from mert_jax.models import spectrograms

RATE, N_FFT, HOP = 24_000, 2048, 320


def _wave(samples: int) -> np.ndarray:
    rng = np.random.default_rng(samples)
    t = np.arange(samples) / RATE
    tones = sum(np.sin(2 * np.pi * f * t) for f in (110, 277.2, 659.3))
    return (0.1 * tones * (t % 0.3) + 0.001 * rng.normal(size=samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [24_000, 24_319])
def test_log_mel_is_that_of_librosa(samples):
    wave = _wave(samples)
    mel = librosa.feature.melspectrogram(
        y=wave, sr=RATE, n_fft=N_FFT, hop_length=HOP, n_mels=229, pad_mode="constant"
    )
    found = spectrograms.log_mel(
        jnp.asarray(wave[None]), spectrograms.mel_filters(RATE, N_FFT, 229), HOP
    )
    # near the floor of 1e-5, float32 transforms differ by as much
    np.testing.assert_allclose(found[0], np.log(mel.T + 1e-5), atol=2e-3)


@pytest.mark.parametrize("classes", [12, 264])
def test_chroma_is_that_of_librosa(classes):
    wave = _wave(30_000)
    expected = librosa.feature.chroma_stft(
        y=wave, sr=RATE, n_fft=N_FFT, hop_length=HOP, n_chroma=classes, tuning=0.0
    )
    found = spectrograms.chroma(
        jnp.asarray(wave[None]), spectrograms.chroma_filters(RATE, N_FFT, classes), HOP
    )
    assert found.shape == (1, len(wave) // HOP + 1, classes)
    np.testing.assert_allclose(found[0], expected.T, atol=1e-4)


def test_chroma_of_silence_is_zero():
    filters = spectrograms.chroma_filters(RATE, N_FFT, 264)
    np.testing.assert_array_equal(spectrograms.chroma(jnp.zeros((1, 3200)), filters, HOP), 0)


def test_normalise_takes_level_and_offset_away_but_not_silence():
    wave = _wave(24_000)
    found = spectrograms.normalise(jnp.asarray(np.stack([wave, 0.3 * wave + 0.2, 0 * wave])))
    np.testing.assert_allclose(found[0].std(), 1, atol=1e-3)
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(found[2], 0)


def test_standardise_leaves_bands_that_never_change_at_zero():
    x = jnp.asarray([[1.0, 5.0], [3.0, 5.0]])
    found = spectrograms.standardise(x, jnp.asarray([[2.0, 4.0]]), jnp.asarray([[0.5, 0.0]]))
    np.testing.assert_allclose(found, [[-2, 0], [2, 0]])
