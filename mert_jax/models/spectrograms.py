"""Features of a wave: frames, power spectrum, log-mel and chroma, in at least float32.

Shapes: B clips, N samples, T = N // hop + 1 frames (frame i is centred on sample i * hop), F bins.
"""

import jax
import jax.numpy as jnp
import librosa
import numpy as np

Array = jax.Array


def frames(wave: Array, frame_length: int, hop: int) -> Array:
    """Return centred, zero-padded frames of `wave` [B, N]: [B, N // hop + 1, frame_length]."""
    num_frames = wave.shape[-1] // hop + 1
    padded = jnp.pad(wave, ((0, 0), (frame_length // 2, frame_length)))
    # frames as neighbouring hops: a reshape and shifted copies instead of a gather
    blocks = -(-frame_length // hop)
    hops = padded[:, : (num_frames + blocks - 1) * hop].reshape(wave.shape[0], -1, hop)
    shifted = [hops[:, i : i + num_frames] for i in range(blocks)]
    return jnp.concatenate(shifted, -1)[..., :frame_length]


def power_spectrum(wave: Array, n_fft: int, hop: int) -> Array:
    """Return the power spectrum of `wave` [B, N] under a Hann window: [B, T, n_fft // 2 + 1]."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    spectrum = jnp.fft.rfft(frames(wave, n_fft, hop) * jnp.asarray(window, wave.dtype)[None, None])
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def normalise(wave: Array) -> Array:
    """Return each clip of `wave` [B, N] with mean 0 and variance 1 (Wav2Vec2FeatureExtractor)."""
    # transformers' 1e-7 leaves clips below -70 dB quiet
    mean, variance = wave.mean(-1, keepdims=True), wave.var(-1, keepdims=True)
    return (wave - mean) / jnp.sqrt(variance + 1e-7)


def standardise(features: Array, mean: Array, std: Array) -> Array:
    """Return (features - mean) / std, all of one rank, and 0 in bands that never change."""
    return jnp.where(std > 1e-3, (features - mean) / jnp.maximum(std, 1e-3), 0)


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Return Slaney-normalised mel filters f32 [n_fft // 2 + 1, n_mels] (librosa.filters.mel)."""
    return librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels).T.astype(np.float32)


def log_mel(wave: Array, filters: Array, hop: int) -> Array:
    """Return log(mel power + 1e-5) [B, T, n_mels] of `wave`, `filters` [n_fft // 2 + 1, n_mels]."""
    power = power_spectrum(wave, 2 * (filters.shape[0] - 1), hop)
    return jnp.log(jnp.einsum("btf,fm->btm", power, filters) + 1e-5)


def chroma_filters(sample_rate: int, n_fft: int, n_chroma: int) -> np.ndarray:
    """Return chroma filters f32 [n_fft // 2 + 1, n_chroma] for A = 440 Hz (librosa)."""
    filters = librosa.filters.chroma(sr=sample_rate, n_fft=n_fft, n_chroma=n_chroma, tuning=0.0)
    return filters.T.astype(np.float32)


def chroma(wave: Array, filters: Array, hop: int) -> Array:
    """Return the chroma of `wave` [B, N] relative to each frame's largest class: [B, T, n_chroma].

    As librosa.feature.chroma_stft with tuning 0; frames below the floor of `log_mel` fade to 0.
    """
    power = power_spectrum(wave, 2 * (filters.shape[0] - 1), hop)
    classes = jnp.einsum("btf,fc->btc", power, filters)
    return classes / jnp.maximum(classes.max(-1, keepdims=True), 1e-5)
