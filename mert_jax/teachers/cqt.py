"""The musical teacher: a Constant-Q Transform, exactly nnAudio's CQT1992v2, computed by FFT.

The definition correlates the wave with one long kernel a bin at every hop. Decimation by the hop is
exact in the frequency domain: with blocks of hop * M samples, the spectrum of the wave times the
kernel's, folded to M points, is the spectrum of the decimated result. A kernel's spectrum is a few
lobes wide and real up to half a sample's delay, so that a bin costs a handful of products for each
of its M points and one inverse FFT of M points.

A TPU has no FFT: its compiler makes matrix products of one, for minutes, and those that are written
out here (`BY_PRODUCTS`) compile in seconds, run sooner and leave out what no kernel needs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.errors import UserError
from mert_jax.teachers.teacher import Teacher

Array = jax.Array
Complex = tuple[Array, Array]  # real and imaginary parts, each float32
# Half-width of a kernel's band, in units of the inverse of its length. A Hann window's spectrum
# falls with the third power: what is left out is 4e-6 of the result for a click, less for music.
LOBES = 40


class Band(NamedTuple):
    """Bins that share a part of the spectrum: its rows [first, last) of `points` lines each.

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
        turns = np.round(x)
        singular = np.abs(x - turns) < 1e-13
        safe = np.where(singular, 0.25, x - turns)
        ratio = np.where(singular, length, np.sin(np.pi * length * safe) / np.tan(np.pi * safe))
        return np.where(length * turns % 2, -ratio, ratio)

    window = 0.5 * dirichlet(offset) + 0.25 * (
        dirichlet(offset - 1 / length) + dirichlet(offset + 1 / length)
    )
    return window * (2 / length) * length**0.5


class Fourier(NamedTuple):
    """A way to compute the transforms of blocks [B, hop * M].

    lines: (blocks, hop, first, last) -> lines [first, last) * M of their spectrum, [B, last -
    first, M]; inverse: (spectra [B, F, M], start, stop) -> points [start, stop) of their inverse
    transform, [B, F, stop - start].
    """

    lines: Callable[[Array, int, int, int], Complex]
    inverse: Callable[[Complex, int, int], Complex]


def apply(params: Any, wave: Array, **sizes: Any) -> Array:
    """Magnitudes f32[B, N // hop + 1, F] of `wave` [B, N], whatever N and the compute dtype.

    params: for each band its kernels' spectra, f32[points, rows, bins].
    """
    ways = dict(tpu=BY_PRODUCTS, default=BY_FFT)
    forms = {
        name: functools.partial(magnitudes, fourier=way, **sizes) for name, way in ways.items()
    }
    return jax.lax.platform_dependent(params, wave.astype(jnp.float32), **forms)


def magnitudes(
    params: Any,
    wave: Array,
    *,
    fourier: Fourier,
    hop: int,
    points: int,
    margin: int,
    bands: tuple[Band, ...],
) -> Array:
    """`apply` of a float32 `wave`, with the transforms computed as `fourier` does."""
    num_frames = wave.shape[-1] // hop + 1
    blocks, skip = _blocks(wave, hop, points, margin)
    size = blocks.shape[-1]
    stride = hop * points // size  # a shorter block has every stride-th line
    points //= stride
    low, high = min(band.first for band in bands), max(band.last for band in bands)
    lines = fourier.lines(blocks, hop, low, high)
    angle = (np.pi / size) * np.arange(low * points, high * points).reshape(-1, points)
    # real beside imaginary part: the kernels are real
    rows = [jnp.concatenate(x) for x in (lines, _turn(lines, angle))]
    stop = skip + min(points - 2 * skip, num_frames)
    found = []
    for kernels, band in zip(params, bands, strict=True):
        # the sum over rows folds the band to `points` lines, which is decimation by the hop
        sums = jnp.einsum(
            "brm,mrk->mbk",
            rows[band.delayed][:, band.first - low : band.last - low],
            kernels[::stride],
            precision=jax.lax.Precision.HIGHEST,
        ).transpose(1, 2, 0)  # as its own step: faster on a CPU
        spectra = sums[: len(blocks)], sums[len(blocks) :]
        found.append(_magnitude(*fourier.inverse(spectra, skip, stop)))
    order = np.argsort(np.concatenate([band.bins for band in bands]))
    found = jnp.concatenate(found, 1)[:, order]  # [blocks, F, frames]
    return found.swapaxes(1, 2).reshape(len(wave), -1, len(order))[:, :num_frames]


def _blocks(wave: Array, hop: int, points: int, margin: int) -> tuple[Array, int]:
    """Blocks [B * blocks, size] of `wave` [B, N], and how many frames at each end of a block
    belong to its neighbours: a clip is the shortest block that holds it, or several (overlap-save).
    """
    samples = wave.shape[-1]
    reach = samples + margin * hop  # the zeros at the end of a single block serve both ends
    shorter = [points // n for n in range(1, points + 1) if points % n == 0]
    if fitting := [hop * n for n in shorter if hop * n >= reach]:
        return jnp.pad(wave, ((0, 0), (0, min(fitting) - samples))), 0
    step = hop * (points - 2 * margin)
    starts = range(0, samples + 1, step)
    padded = jnp.pad(wave, ((0, 0), (margin * hop, starts[-1] + step + margin * hop - samples)))
    blocks = [padded[:, start : start + hop * points] for start in starts]
    return jnp.stack(blocks, 1).reshape(-1, hop * points), margin


def _lines(spectrum: Array, first: int, last: int, size: int) -> Array:
    """Lines [first, last) of a DFT of `size` real samples, of which `spectrum` has the first half;
    a wide kernel reaches below zero and past the Nyquist frequency."""
    if first < 0 or last > spectrum.shape[-1]:
        mirrored = spectrum[:, 1 : (size + 1) // 2][:, ::-1].conj()
        whole = jnp.concatenate([spectrum, mirrored], 1)
        below, above = max(0, -first), max(0, last - size)
        spectrum = jnp.pad(whole, ((0, 0), (below, above)), mode="wrap")
        first, last = first + below, last + below
    return spectrum[:, first:last]


def _lines_by_fft(blocks: Array, hop: int, first: int, last: int) -> Complex:
    size = blocks.shape[-1]
    points = size // hop
    lines = _lines(jnp.fft.rfft(blocks), first * points, last * points, size)
    lines = lines.reshape(-1, last - first, points)
    return lines.real, lines.imag


def _inverse_by_fft(spectra: Complex, start: int, stop: int) -> Complex:
    points = jnp.fft.ifft(jax.lax.complex(*spectra))[..., start:stop]
    return points.real, points.imag


def _lines_by_products(blocks: Array, hop: int, first: int, last: int) -> Complex:
    """Cooley and Tukey's two steps: sample p * hop + h and line r * M + m meet at the angle
    p m / M + h m / (hop M) + h r / hop, of which the last needs no more rows than are asked for."""
    points = blocks.shape[-1] // hop
    m, h = np.arange(points), np.arange(hop)
    wave = blocks.reshape(-1, points, hop)
    real, imag = (_product("bph,pm->bmh", wave, part) for part in _roots(m, m, points))
    x = _turn((real, imag), (2 * np.pi / blocks.shape[-1]) * np.outer(m, h))
    return _complex_product("bmh,hr->brm", x, _roots(h, np.arange(first, last), hop))


def _inverse_by_products(spectra: Complex, start: int, stop: int) -> Complex:
    points = spectra[0].shape[-1]
    cos, sin = _roots(np.arange(points), np.arange(start, stop), points)
    return _complex_product("bkm,mt->bkt", spectra, (cos / points, -sin / points))


BY_FFT = Fourier(_lines_by_fft, _inverse_by_fft)
BY_PRODUCTS = Fourier(_lines_by_products, _inverse_by_products)
# float32 as of a transform: a TPU would round the factors to bfloat16
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _roots(i: np.ndarray, j: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary parts of exp(-2 pi sqrt(-1) i j / n), each f32[I, J]."""
    angle = (2 * np.pi / n) * (np.outer(i, j) % n)
    return np.cos(angle).astype(np.float32), -np.sin(angle).astype(np.float32)


def _turn(x: Complex, angle: np.ndarray) -> Complex:
    """Complex numbers x [B, I, J], turned back by `angle` [I, J]."""
    cos, sin = (f(angle)[None].astype(np.float32) for f in (np.cos, np.sin))
    return x[0] * cos + x[1] * sin, x[1] * cos - x[0] * sin


def _complex_product(axes: str, x: Complex, matrix: tuple[np.ndarray, np.ndarray]) -> Complex:
    """The einsum of x [B, I, J] with a complex matrix, both parts of x as rows of one product."""
    rows = len(x[0])
    real, imag = (_product(axes, jnp.concatenate(x), part) for part in matrix)
    return real[:rows] - imag[rows:], real[rows:] + imag[:rows]


def _magnitude(real: Array, imag: Array) -> Array:
    """Absolute values, with gradient 0 where they are 0."""
    power = jnp.square(real) + jnp.square(imag)
    return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1)), 0)


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

    Raises UserError when a size is not positive or the highest bin lies above half the sample rate.
    """
    sizes = dict(
        sample_rate=sample_rate, hop=hop, fmin=fmin, n_bins=n_bins, bins_per_octave=bins_per_octave
    )
    if wrong := [name for name, value in sizes.items() if value <= 0]:
        raise UserError(f"the CQT needs {wrong[0]} above 0, not {sizes[wrong[0]]}")
    lengths, frequencies = lengths_and_frequencies(sample_rate, fmin, n_bins, bins_per_octave)
    if frequencies[-1] > sample_rate / 2:
        raise UserError(
            f"the highest CQT bin is {frequencies[-1]:.0f} Hz, above half the sample rate of "
            f"{sample_rate} Hz; lower n_bins ({n_bins}) or fmin ({fmin})"
        )
    margin = -(-int(lengths[0] + 1) // (2 * hop))
    points = _fast_size(max(480, 4 * margin))
    bands, params = [], []
    for start in range(0, n_bins, bins_per_octave):
        octave = np.arange(start, min(start + bins_per_octave, n_bins))
        for delayed in (False, True):
            bins = octave[lengths[octave] % 2 == delayed]
            if not len(bins):
                continue
            # the ends of a band are cut for the bins there alone: with few bins they weigh more
            lobes = LOBES * max(1, (24 / len(bins)) ** (1 / 3))
            centre, reach = frequencies[bins] / sample_rate, lobes / lengths[bins]
            first = int(np.floor((centre - np.minimum(reach, 0.5)).min() * hop))
            # a whole period of the spectrum leaves nothing out
            last = min(int(np.ceil((centre + reach).max() * hop)), first + hop)
            lines = np.arange(first * points, last * points) / (hop * points)
            kernels = [
                kernel_spectrum(lines - f, length)
                for f, length in zip(centre, lengths[bins], strict=True)
            ]
            kernels = np.stack(kernels, -1).reshape(last - first, points, len(bins)) / hop
            params.append(kernels.transpose(1, 0, 2).astype(np.float32, order="C"))
            bands.append(Band(tuple(bins), delayed, first, last))
    bound = functools.partial(apply, hop=hop, points=points, margin=margin, bands=tuple(bands))
    return Teacher(bound, params, n_bins)


def _fast_size(at_least: int) -> int:
    """The smallest size from `at_least` on with no prime factor above 5."""

    def smooth(n: int) -> bool:
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    return next(n for n in range(at_least, 2 * at_least + 2) if smooth(n))
