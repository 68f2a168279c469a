"""Discrete Fourier transforms of blocks, by matrix products where there is no FFT.

Shapes: blocks [B, hop * M] of real samples, whose spectra are seen as rows of M lines.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Complex = tuple[Array, Array]  # real and imaginary parts, each float32
# on a TPU the default precision would round the factors to bfloat16
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def spectrum_rows(blocks: Array, hop: int, first: int, last: int) -> Complex:
    """Return `spectrum_rows_plain`."""
    sizes = dict(hop=hop, first=first, last=last)
    plain = functools.partial(spectrum_rows_plain, **sizes)
    # TPU: its compiler turns an FFT into matrix products, for minutes; those written out here
    # compile in seconds, run faster and leave out the lines that the caller does not need
    by_products = functools.partial(spectrum_rows_by_products, **sizes)
    return jax.lax.platform_dependent(blocks, tpu=by_products, default=plain)


def inverse(spectra: Complex, start: int, stop: int) -> Complex:
    """Return `inverse_plain`."""
    plain = functools.partial(inverse_plain, start=start, stop=stop)
    by_products = functools.partial(inverse_by_products, start=start, stop=stop)
    return jax.lax.platform_dependent(spectra, tpu=by_products, default=plain)


def spectrum_rows_plain(blocks: Array, hop: int, first: int, last: int) -> Complex:
    """Return rows [first, last) of the spectra, [B, last - first, M]; rows repeat every `hop`."""
    size = blocks.shape[-1]
    points = size // hop
    spectrum = jnp.fft.rfft(blocks)
    if first >= 0 and last * points <= spectrum.shape[-1]:
        lines = spectrum[:, first * points : last * points]
    else:  # of a real signal: line size - n is the conjugate of line n
        mirrored = spectrum[:, 1 : (size + 1) // 2][:, ::-1].conj()
        periodic = np.arange(first * points, last * points) % size
        lines = jnp.concatenate([spectrum, mirrored], 1)[:, periodic]
    lines = lines.reshape(-1, last - first, points)
    return lines.real, lines.imag


def inverse_plain(spectra: Complex, start: int, stop: int) -> Complex:
    """Return points [start, stop) of the inverse transforms of `spectra` [B, F, M]."""
    points = jnp.fft.ifft(jax.lax.complex(*spectra))[..., start:stop]
    return points.real, points.imag


def spectrum_rows_by_products(blocks: Array, hop: int, first: int, last: int) -> Complex:
    """Return `spectrum_rows_plain` by two steps of Cooley and Tukey.

    With w(x) = exp(-2 pi i x), sample p hop + h and line r M + m of hop * M meet at
    w(p m / M) w(h m / (hop M)) w(h r / hop).
    """
    points = blocks.shape[-1] // hop
    m, h = np.arange(points), np.arange(hop)
    wave = blocks.reshape(-1, points, hop)
    real, imag = (_product("bph,pm->bmh", wave, part) for part in _roots(m, m, points))
    x = turn((real, imag), (2 * np.pi / blocks.shape[-1]) * np.outer(m, h))
    return _complex_product("bmh,hr->brm", x, _roots(h, np.arange(first, last), hop))


def inverse_by_products(spectra: Complex, start: int, stop: int) -> Complex:
    """Return `inverse_plain` by one product."""
    points = spectra[0].shape[-1]
    cos, sin = _roots(np.arange(points), np.arange(start, stop), points)
    return _complex_product("bkm,mt->bkt", spectra, (cos / points, -sin / points))


def turn(x: Complex, angle: np.ndarray) -> Complex:
    """Return x exp(-i angle) of complex numbers x [B, I, J] and angles [I, J]."""
    cos, sin = (f(angle)[None].astype(np.float32) for f in (np.cos, np.sin))
    return x[0] * cos + x[1] * sin, x[1] * cos - x[0] * sin


def _roots(i: np.ndarray, j: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the real and imaginary parts of exp(-2 pi sqrt(-1) i j / n), each f32[I, J]."""
    angle = (2 * np.pi / n) * (np.outer(i, j) % n)
    return np.cos(angle).astype(np.float32), -np.sin(angle).astype(np.float32)


def _complex_product(axes: str, x: Complex, matrix: tuple[np.ndarray, np.ndarray]) -> Complex:
    """Return the einsum of x [B, I, J] with a complex matrix, both parts of x in one product."""
    rows = len(x[0])
    real, imag = (_product(axes, jnp.concatenate(x), part) for part in matrix)
    return real[:rows] - imag[rows:], real[rows:] + imag[:rows]
