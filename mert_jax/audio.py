"""Wave to features: framing and log-mel. Pure, jit-compiled, in at least float32.

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


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Slaney-normalised mel filters f32[n_fft // 2 + 1, n_mels] (librosa.filters.mel)."""
    import librosa  # a second of imports that only making a teacher has to wait for

    return librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels).T.astype(np.float32)


def log_mel(wave: Array, filters: Array, hop: int) -> Array:
    """Natural log of the mel power spectrogram of `wave` [B, N]: [B, N // hop + 1, n_mels].

    `filters` [n_fft // 2 + 1, n_mels] set the transform's length; the window is a periodic Hann,
    the floor 1e-5 (-50 dB below a full-scale sine's peak bin is far above it).
    """
    n_fft = 2 * (filters.shape[0] - 1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    spectrum = jnp.fft.rfft(frames(wave, n_fft, hop) * jnp.asarray(window, wave.dtype)[None, None])
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.log(jnp.einsum("btf,fm->btm", power, filters) + 1e-5)
