"""The CQT by its definition, dense and in float64: the reference for the fast one.

Source: KinWaiCheuk/nnAudio, `features/cqt.py`, CQT1992v2. Shapes: B clips, N samples, F bins.
"""

import functools

import numpy as np

FMIN = 32.7


@functools.cache
def kernels(
    n_bins: int, bins_per_octave: int, sample_rate: int = 24_000
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return complex kernels, their lengths, int [F], and their frequencies in Hz, [F].

    Each kernel [length] is rounded to float32 as nnAudio stores it; its element (length + 1) // 2
    belongs to the frame's sample.
    """
    quality = 1 / (2 ** (1 / bins_per_octave) - 1)
    frequencies = FMIN * 2.0 ** (np.arange(n_bins) / bins_per_octave)
    lengths = np.ceil(quality * sample_rate / frequencies).astype(int)
    waves = []
    for length, frequency in zip(lengths, frequencies, strict=True):
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)  # periodic
        n = np.arange(length) - (length + 1) // 2
        kernel = hann * np.exp(2j * np.pi * n * frequency / sample_rate)
        waves.append((kernel / np.abs(kernel).sum()).astype(np.complex64))
    return waves, lengths, frequencies


def magnitudes(
    wave: np.ndarray,
    n_bins: int = 336,
    bins_per_octave: int = 48,
    sample_rate: int = 24_000,
    hop: int = 320,
) -> np.ndarray:
    """Return magnitudes float64 [B, N // hop + 1, F] of `wave` [B, N]."""
    num_frames = wave.shape[1] // hop + 1
    waves, lengths, _ = kernels(n_bins, bins_per_octave, sample_rate)
    reach = -(-(int(lengths.max()) + 1) // (2 * hop)) + 1  # hops on each side of a frame
    padded = np.zeros((len(wave), (num_frames + 2 * reach) * hop))
    padded[:, reach * hop :][:, : wave.shape[1]] = wave
    hops = padded.reshape(len(wave), -1, hop)
    result = np.empty((len(wave), num_frames, n_bins))
    for k, kernel in enumerate(waves):
        before = (len(kernel) + 1) // 2
        blocks = -(-before // hop)  # whole hops before the frame's sample
        # the kernel cut at hops too: one product with each hop of the wave serves all frames
        pieces = np.zeros((blocks + -(-(len(kernel) - before) // hop), hop), complex)
        pieces.reshape(-1)[blocks * hop - before :][: len(kernel)] = kernel.conj()
        real, imag = hops @ pieces.real.T, hops @ pieces.imag.T  # [B, hops, pieces]
        total = np.zeros((len(wave), num_frames), complex)
        for i in range(len(pieces)):
            rows = slice(reach - blocks + i, reach - blocks + i + num_frames)
            total += real[:, rows, i] + 1j * imag[:, rows, i]
        result[..., k] = np.abs(total) * lengths[k] ** 0.5
    return result
