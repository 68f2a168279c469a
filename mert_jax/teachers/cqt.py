"""The musical teacher: a Constant-Q Transform, exactly nnAudio's CQT1992v2, computed by FFT.

Frame t of bin k, with kernels of l_k samples around frequency f_k:

    C[t, k] = sqrt(l_k) | sum_n wave[t hop + n] conj(kernel_k[n]) |
    kernel_k[n] = hann_k[n] exp(2 pi i n f_k / sample_rate) / sum(hann_k)

`tests/cqt_definition.py` computes it so. Here the sum is taken in the frequency domain, where
decimation by the hop is exact: the product of the spectra of wave and kernel over hop * M samples,
folded to M lines, is the spectrum of M frames. A kernel's spectrum is a few lobes wide, and real up
to a delay of half a sample, so a bin costs a few products a line and one inverse FFT of M points.
Shapes: B clips, N samples, F bins.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.fft import next_fast_len

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.kernels import dft
from mert_jax.teachers.teacher import Teacher

Array = jax.Array
# Half-width of a kernel's band, in units of the inverse of its length. A Hann window's spectrum
# falls with the third power: the rest is 4e-6 of the result for a click, less for music.
LOBES = 40


class Band(NamedTuple):
    """Bins that share rows [first, last) of the spectrum."""

    bins: tuple[int, ...]
    delayed: bool  # kernels of odd length, centred half a sample early
    first: int
    last: int


def lengths_and_frequencies(
    sample_rate: int, fmin: float, n_bins: int, bins_per_octave: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel lengths in samples, int [F], and centre frequencies in Hz, float64 [F]."""
    quality = 1 / (2 ** (1 / bins_per_octave) - 1)
    frequencies = fmin * 2.0 ** (np.arange(n_bins) / bins_per_octave)
    return np.ceil(quality * sample_rate / frequencies).astype(int), frequencies


def kernel_spectrum(offset: np.ndarray, length: int) -> np.ndarray:
    """Return the real spectrum of a kernel times sqrt(length), `offset` cycles a sample off centre.

    The spectrum of a periodic Hann window is a sum of three Dirichlet kernels; each is
    sin(pi l x) cot(pi x) up to an imaginary part, and the three imaginary parts cancel.
    """

    def dirichlet(x: np.ndarray) -> np.ndarray:
        turns = np.round(x)
        singular = np.abs(x - turns) < 1e-13
        safe = np.where(singular, 0.25, x - turns)
        ratio = np.where(singular, length, np.sin(np.pi * length * safe) / np.tan(np.pi * safe))
        return np.where(length * turns % 2, -ratio, ratio)

    sides = dirichlet(offset - 1 / length) + dirichlet(offset + 1 / length)
    return (0.5 * dirichlet(offset) + 0.25 * sides) * (2 / length) * length**0.5


def apply(
    params: Any, wave: Array, *, hop: int, points: int, margin: int, bands: tuple[Band, ...]
) -> Array:
    """Return magnitudes f32[B, N // hop + 1, F] of `wave` [B, N] of any float type.

    params: the spectra of each band's kernels, f32[points, rows, bins].
    """
    num_frames = wave.shape[-1] // hop + 1
    blocks, skip = _blocks(wave.astype(jnp.float32), hop, points, margin)
    size = blocks.shape[-1]
    stride = hop * points // size  # a shorter block has every stride-th line
    points //= stride
    low, high = min(band.first for band in bands), max(band.last for band in bands)
    spectrum = dft.spectrum_rows(blocks, hop, low, high)
    half_sample = (np.pi / size) * np.arange(low * points, high * points).reshape(-1, points)
    # real and imaginary parts as rows of one array: the kernels are real
    spectra = [jnp.concatenate(x) for x in (spectrum, dft.turn(spectrum, half_sample))]
    stop = skip + min(points - 2 * skip, num_frames)
    by_band = []
    for kernels, band in zip(params, bands, strict=True):
        rows = spectra[band.delayed][:, band.first - low : band.last - low]
        # the sum over rows folds the band to `points` lines, which is decimation by the hop
        folded = jnp.einsum("brm,mrk->mbk", rows, kernels[::stride], precision="highest")
        folded = folded.transpose(1, 2, 0)  # as its own step: faster on a CPU
        real, imag = dft.inverse((folded[: len(blocks)], folded[len(blocks) :]), skip, stop)
        power = jnp.square(real) + jnp.square(imag)
        # with gradient 0 instead of NaN where the power is 0
        by_band.append(jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1)), 0))
    order = np.argsort(np.concatenate([band.bins for band in bands]))
    result = jnp.concatenate(by_band, 1)[:, order]  # [blocks, F, frames]
    return result.swapaxes(1, 2).reshape(len(wave), -1, len(order))[:, :num_frames]


def _blocks(wave: Array, hop: int, points: int, margin: int) -> tuple[Array, int]:
    """Return the shortest block that holds a clip, or several [B * blocks, size] that overlap.

    With them the number of frames at each end of a block that belong to its neighbours.
    """
    samples, ends, size = wave.shape[-1], margin * hop, hop * points
    # the zeros at the end of a single block serve both ends
    sizes = [size // n for n in range(1, points + 1) if points % n == 0]
    if large_enough := [x for x in sizes if x >= samples + ends]:
        return jnp.pad(wave, ((0, 0), (0, min(large_enough) - samples))), 0
    step = size - 2 * ends
    starts = range(0, samples + 1, step)
    padded = jnp.pad(wave, ((0, 0), (ends, starts[-1] + step + ends - samples)))
    blocks = [padded[:, start : start + size] for start in starts]
    return jnp.stack(blocks, 1).reshape(-1, size), margin


def make(
    *,
    sample_rate: int = SAMPLE_RATE,
    hop: int = HOP_LENGTH,
    fmin: float = 32.7,
    n_bins: int = 336,
    bins_per_octave: int = 48,
) -> Teacher:
    """Make nnAudio's CQT1992v2 (KinWaiCheuk/nnAudio, `features/cqt.py`); the defaults are MERT's.

    Raises UserError if a size is not positive or the highest bin is above half the sample rate.
    """
    sizes = dict(sample_rate=sample_rate, hop=hop, fmin=fmin, n_bins=n_bins)
    sizes |= dict(bins_per_octave=bins_per_octave)
    if min(sizes.values()) <= 0:
        raise UserError(f"the CQT needs sizes above 0, not {sizes}")
    lengths, frequencies = lengths_and_frequencies(sample_rate, fmin, n_bins, bins_per_octave)
    if frequencies[-1] > sample_rate / 2:
        highest = f"the highest CQT bin is {frequencies[-1]:.0f} Hz, above half of {sample_rate} Hz"
        raise UserError(f"{highest}; lower n_bins ({n_bins}) or fmin ({fmin})")
    margin = -(-int(lengths[0] + 1) // (2 * hop))
    points = next_fast_len(max(480, 4 * margin), real=True)
    octave_and_parity = 2 * (np.arange(n_bins) // bins_per_octave) + lengths % 2
    by_band = [np.flatnonzero(octave_and_parity == k) for k in np.unique(octave_and_parity)]
    pairs = [_band(bins, lengths, frequencies / sample_rate, hop, points) for bins in by_band]
    bands, params = zip(*pairs, strict=True)
    bound = functools.partial(apply, hop=hop, points=points, margin=margin, bands=bands)
    return Teacher(bound, list(params), n_bins)


def _band(
    bins: np.ndarray, lengths: np.ndarray, centres: np.ndarray, hop: int, points: int
) -> tuple[Band, np.ndarray]:
    """Return a band of bins, all even or all odd in length, and its kernels' spectra."""
    # the ends of a band are cut for the bins there alone: with few bins they weigh more
    lobes = LOBES * max(1, (24 / len(bins)) ** (1 / 3))
    lengths, centres = lengths[bins], centres[bins]
    reach = lobes / lengths
    first = int(np.floor((centres - np.minimum(reach, 0.5)).min() * hop))
    # a whole period of the spectrum leaves nothing out
    last = min(int(np.ceil((centres + reach).max() * hop)), first + hop)
    lines = np.arange(first * points, last * points) / (hop * points)
    kernels = [kernel_spectrum(lines - f, n) for f, n in zip(centres, lengths, strict=True)]
    kernels = np.stack(kernels, -1).reshape(last - first, points, len(bins)) / hop
    kernels = kernels.transpose(1, 0, 2).astype(np.float32, order="C")
    return Band(tuple(bins), bool(lengths[0] % 2), first, last), kernels
