"""Wave to features: framing, log-mel and chroma. Pure, jit-compiled, in at least float32.

Shapes: B clips, N samples, T = N // hop + 1 frames (frame i is centred on sample i * hop), F bins.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def frames(wave: Array, frame_length: int, hop: int) -> Array:
    """Centred, zero-padded frames of `wave` [B, N]: [B, N // hop + 1, frame_length]."""
    num_frames = wave.shape[-1] // hop + 1
    padded = jnp.pad(wave, ((0, 0), (frame_length // 2, frame_length)))
    # whole hops side by side: a reshape and a few shifted copies instead of a gather
    blocks = -(-frame_length // hop)
    hops = padded[:, : (num_frames + blocks - 1) * hop].reshape(wave.shape[0], -1, hop)
    pieces = [hops[:, i : i + num_frames] for i in range(blocks)]
    return jnp.concatenate(pieces, -1)[..., :frame_length]


def power_spectrum(wave: Array, n_fft: int, hop: int) -> Array:
    """Squared magnitudes of the short-time spectrum of `wave` [B, N]: [B, T, n_fft // 2 + 1].

    The window is a periodic Hann.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    spectrum = jnp.fft.rfft(frames(wave, n_fft, hop) * jnp.asarray(window, wave.dtype)[None, None])
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def normalise(wave: Array) -> Array:
    """`wave` [B, N] at zero mean and unit variance, clip by clip (transformers,
    `Wav2Vec2FeatureExtractor`, whose 1e-7 leaves clips below -70 dB nearly silent)."""
    mean, variance = wave.mean(-1, keepdims=True), wave.var(-1, keepdims=True)
    return (wave - mean) / jnp.sqrt(variance + 1e-7)


def standardise(features: Array, mean: Array, std: Array) -> Array:
    """`features` less `mean`, over `std`; the three have one rank.

    A band that never changes (silence, above a lossy codec's cut-off) says nothing: it becomes 0.
    """
    return jnp.where(std > 1e-3, (features - mean) / jnp.maximum(std, 1e-3), 0)


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Slaney-normalised mel filters f32[n_fft // 2 + 1, n_mels] (librosa.filters.mel)."""
    import librosa  # a second of imports that only making a teacher has to wait for

    return librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels).T.astype(np.float32)


def log_mel(wave: Array, filters: Array, hop: int) -> Array:
    """Natural log of the mel power spectrogram of `wave` [B, N]: [B, N // hop + 1, n_mels].

    `filters` [n_fft // 2 + 1, n_mels] set the transform's length; the floor is 1e-5 (-50 dB below a
    full-scale sine's peak bin is far above it).
    """
    power = power_spectrum(wave, 2 * (filters.shape[0] - 1), hop)
    return jnp.log(jnp.einsum("btf,fm->btm", power, filters) + 1e-5)


def chroma_filters(sample_rate: int, n_fft: int, n_chroma: int) -> np.ndarray:
    """Chroma filters f32[n_fft // 2 + 1, n_chroma], at A = 440 Hz (librosa.filters.chroma)."""
    import librosa

    filters = librosa.filters.chroma(sr=sample_rate, n_fft=n_fft, n_chroma=n_chroma, tuning=0.0)
    return filters.T.astype(np.float32)


def chroma(wave: Array, filters: Array, hop: int) -> Array:
    """Chroma of `wave` [B, N], the greatest class of a frame being 1: [B, N // hop + 1, n_chroma].

    `filters` [n_fft // 2 + 1, n_chroma] set the transform's length (librosa.feature.chroma_stft
    without its guess of the tuning; a frame below log_mel's floor fades to 0).
    """
    power = power_spectrum(wave, 2 * (filters.shape[0] - 1), hop)
    classes = jnp.einsum("btf,fc->btc", power, filters)
    return classes / jnp.maximum(classes.max(-1, keepdims=True), 1e-5)
