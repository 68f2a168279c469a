"""The student's first group norm on a file of any length, from one pass over its samples.

The norm's input is a convolution of k taps, so the mean and variance of each of its C channels
follow from the mean and covariance of the k samples under it. So a file can be embedded piece by
piece, and beside clips of other lengths, with the result that it has alone and whole.
"""

from typing import NamedTuple

import numpy as np

from mert_jax.kernels.numerics import EPSILON

FLOOR = 1e-7  # added to the variance of a wave that is normalised, as transformers does


class Norm(NamedTuple):
    """The student hears (sample - mean) * scale; the norm is convolution * factor + shift, [C]."""

    mean: float
    scale: float
    factor: np.ndarray
    shift: np.ndarray


class Moments:
    """The sums of a wave in blocks f32 [n] that give its norm, in float64 because of its offset.

    `kernel` [k, C] is the convolution's, `scale` and `bias` [C] the group norm's. If `normalised`,
    the wave is first brought to mean 0 and variance 1.
    """

    def __init__(
        self, kernel: np.ndarray, stride: int, scale: np.ndarray, bias: np.ndarray, normalised: bool
    ):
        self._kernel, self._stride, self._affine = kernel.astype(np.float64), stride, (scale, bias)
        self._normalised, self._rest = normalised, np.empty(0, np.float32)
        self.samples, self._sum, self._squares = 0, 0.0, 0.0
        self._patches, self._first, self._second = 0, 0.0, 0.0

    def add(self, block: np.ndarray) -> None:
        self.samples += len(block)
        exact = block.astype(np.float64)
        self._sum += exact.sum()
        self._squares += exact @ exact
        wave, taps = np.concatenate([self._rest, block]), len(self._kernel)
        number = max((len(wave) - taps) // self._stride + 1, 0)
        if number:
            windows = np.lib.stride_tricks.sliding_window_view(wave, taps)
            patches = windows[:: self._stride][:number].astype(np.float64)
            self._first += patches.sum(0)
            self._second += patches.T @ patches
            self._patches += number
        self._rest = wave[number * self._stride :]

    def norm(self) -> Norm:
        offset, gain = 0.0, 1.0
        if self._normalised:
            offset = self._sum / self.samples
            gain = (self._squares / self.samples - offset**2 + FLOOR) ** -0.5
        mean = self._first / self._patches
        covariance = self._second / self._patches - np.outer(mean, mean)
        mean, covariance = (mean - offset) * gain, covariance * gain**2
        variance = np.einsum("kl,kc,lc->c", covariance, self._kernel, self._kernel)
        scale, bias = self._affine
        factor = scale / np.sqrt(np.maximum(variance, 0) + EPSILON)
        shift = bias - mean @ self._kernel * factor
        return Norm(offset, gain, factor.astype(np.float32), shift.astype(np.float32))
