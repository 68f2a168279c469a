"""The musical teacher: a Constant-Q Transform, exactly nnAudio's CQT1992v2, computed by FFT.

The definition correlates the wave with one long kernel a bin at every hop. Decimation by the hop is
exact in the frequency domain: with blocks of hop * M samples, the spectrum of the wave times the
kernel's, folded to M points, is the spectrum of the decimated result. A kernel's spectrum is a few
lobes wide and real up to half a sample's delay, so that a bin costs a handful of products for each
of its M points and one inverse FFT of M points.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.cli import UserError
from mert_jax.teachers import Teacher

Array = jax.Array
# Half-width of a kernel's band, in units of the inverse of its length. A Hann window's spectrum
# falls with the third power: what is left out is 1e-6 of the whole.
LOBES = 32


class Octave(NamedTuple):
    """Bins that share a band of the spectrum: rows [first, last) of M points each.

    bins: their indices; delayed: kernels of odd length, centred half a sample early.
    """

    bins: tuple[int, ...]
    delayed: bool
    first: int
    last: int


def lengths_and_frequencies(
    sample_rate: int, fmin: float, n_bins: int, bins_per_octave: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel lengths in samples, int [n_bins], and centre frequencies in Hz, float64 [n_bins]."""
    quality = 1 / (2 ** (1 / bins_per_octave) - 1)
    frequencies = fmin * 2.0 ** (np.arange(n_bins) / bins_per_octave)
    return np.ceil(quality * sample_rate / frequencies).astype(int), frequencies


def kernel_spectrum(offset: np.ndarray, length: int) -> np.ndarray:
    """Real part of one kernel's spectrum at `offset` cycles a sample from its centre frequency.

    The kernel is a periodic Hann window of `length` samples, times a complex sine that is 1 at the
    window's centre, divided by its L1 norm and multiplied by sqrt(length). A Hann window's spectrum
    is a sum of three Dirichlet kernels; each is sin(pi l x) cot(pi x) up to an imaginary part, and
    the three imaginary parts cancel.
    """

    def dirichlet(x: np.ndarray) -> np.ndarray:
        singular = np.abs(x) < 1e-13
        safe = np.where(singular, 0.25, x)
        return np.where(singular, length, np.sin(np.pi * length * safe) / np.tan(np.pi * safe))

    window = 0.5 * dirichlet(offset) + 0.25 * (
        dirichlet(offset - 1 / length) + dirichlet(offset + 1 / length)
    )
    return window * (2 / length) * length**0.5


def apply(
    params: Any, wave: Array, *, hop: int, points: int, margin: int, octaves: tuple[Octave, ...]
) -> Array:
    """Magnitudes f32[B, N // hop + 1, F] of `wave` [B, N], whatever N and the compute dtype."""
    wave = wave.astype(jnp.float32)
    num_frames = wave.shape[-1] // hop + 1
    size = hop * points
    if wave.shape[-1] + margin * hop <= size:  # one block, whose zeros serve both ends
        blocks = jnp.pad(wave, ((0, 0), (0, size - wave.shape[-1])))[:, None]
        inner = slice(0, points)
    else:  # overlap-save: a block's outer `margin` frames belong to its neighbours
        step = points - 2 * margin
        num_blocks = -(-num_frames // step)
        end = (num_blocks * step + 2 * margin) * hop
        padded = jnp.pad(wave, ((0, 0), (margin * hop, end)))
        starts = [i * step * hop for i in range(num_blocks)]
        blocks = jnp.stack([padded[:, start : start + size] for start in starts], 1)
        inner = slice(margin, points - margin)
    spectrum = jnp.fft.rfft(blocks)
    bins = [
        _magnitudes(spectrum, kernels, octave, hop, points)
        for kernels, octave in zip(params, octaves, strict=True)
    ]
    order = np.argsort(np.concatenate([octave.bins for octave in octaves]))
    magnitudes = jnp.concatenate(bins, -2)[..., order, inner]  # [B, blocks, F, frames]
    return jnp.moveaxis(magnitudes, -2, -1).reshape(wave.shape[0], -1, len(order))[:, :num_frames]


def _magnitudes(spectrum: Array, kernels: Array, octave: Octave, hop: int, points: int) -> Array:
    """Magnitudes [B, blocks, bins, points] of the bins of one octave."""
    first, last = octave.first * points, octave.last * points
    band = _lines(spectrum, first, last, hop * points)
    if octave.delayed:
        delay = np.exp(-1j * np.pi * np.arange(first, last) / (hop * points))
        band = band * delay.astype(np.complex64)[None, None]
    band = band.reshape(*band.shape[:2], -1, points)
    # the sum over rows folds the band to `points` lines, which is decimation by the hop
    fold = lambda rows: jnp.einsum(
        "bcrm,mrk->bckm", rows, kernels, precision=jax.lax.Precision.HIGHEST
    )
    decimated = jnp.fft.ifft(jax.lax.complex(fold(band.real), fold(band.imag)))
    return jnp.sqrt(jnp.square(decimated.real) + jnp.square(decimated.imag))


def _lines(spectrum: Array, first: int, last: int, size: int) -> Array:
    """Lines [first, last) of a DFT of `size` real samples, of which `spectrum` has the first half;
    a wide kernel reaches below zero and past the Nyquist frequency."""
    if first >= 0 and last <= spectrum.shape[-1]:
        return spectrum[..., first:last]
    lines = np.arange(first, last) % size
    mirrored = lines > size // 2
    picked = spectrum[..., np.where(mirrored, size - lines, lines)]
    return jnp.where(mirrored[None, None], picked.conj(), picked)


def make(
    *,
    sample_rate: int = 24_000,
    hop: int = 320,
    fmin: float = 32.7,
    n_bins: int = 336,
    bins_per_octave: int = 48,
) -> Teacher:
    """A CQT of `n_bins` from `fmin` Hz (KinWaiCheuk/nnAudio, `features/cqt.py`, CQT1992v2; the
    defaults are MERT's, 7 octaves of 48 bins at 75 frames a second).

    Raises UserError when the highest bin lies above half the sample rate.
    """
    lengths, frequencies = lengths_and_frequencies(sample_rate, fmin, n_bins, bins_per_octave)
    if frequencies[-1] > sample_rate / 2:
        raise UserError(
            f"the highest CQT bin is {frequencies[-1]:.0f} Hz, above half the sample rate of "
            f"{sample_rate} Hz; lower n_bins ({n_bins}) or fmin ({fmin})"
        )
    margin = -(-int(lengths[0] + 1) // (2 * hop))
    points = _fast_size(max(480, 4 * margin))
    size = hop * points
    octaves, params = [], []
    for start in range(0, n_bins, bins_per_octave):
        for delayed in (False, True):
            bins = [
                k
                for k in range(start, min(start + bins_per_octave, n_bins))
                if lengths[k] % 2 == delayed
            ]
            if not bins:
                continue
            centre, reach = frequencies[bins] / sample_rate, LOBES / lengths[bins]
            first = int(np.floor((centre - reach).min() * size / points))
            last = int(np.ceil((centre + reach).max() * size / points))
            lines = np.arange(first * points, last * points) / size
            kernels = [
                kernel_spectrum(lines - frequencies[k] / sample_rate, lengths[k]) for k in bins
            ]
            kernels = np.stack(kernels, -1).reshape(last - first, points, len(bins)) / hop
            params.append(kernels.transpose(1, 0, 2).astype(np.float32))
            octaves.append(Octave(tuple(bins), delayed, first, last))
    bound = functools.partial(apply, hop=hop, points=points, margin=margin, octaves=tuple(octaves))
    return Teacher(bound, params, n_bins)


def _fast_size(at_least: int) -> int:
    """The smallest size from `at_least` on with no prime factor above 5."""

    def smooth(n: int) -> bool:
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    return next(n for n in range(at_least, 2 * at_least + 2) if smooth(n))
