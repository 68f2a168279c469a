"""The student's first group norm on a file of any length, from one pass over its samples.

The norm's input is a convolution of k taps, so the mean and variance of each of its C channels
follow from the mean and covariance of the k samples under it. They take a few operations a sample
and no memory. A file can be embedded piece by piece, and beside clips of other lengths, with the
result that it has alone and whole.
"""

from typing import NamedTuple

import numpy as np

from mert_jax.kernels.numerics import EPSILON

FLOOR = 1e-7  # added to the variance of a wave that is normalised, as transformers does


class Norm(NamedTuple):
    """The normalisation of a file's samples and of its first convolution.

    The student hears (sample - mean) * scale. The group norm multiplies the convolution's result by
    `factor` and adds `shift`, f32 [C].
    """

    mean: float
    scale: float
    factor: np.ndarray
    shift: np.ndarray


class Moments:
    """Sums over patches of `taps` samples, one every `stride`, of a wave in blocks f32 [n].

    In float64, since single precision loses the variance of a wave with an offset.
    """

    def __init__(self, taps: int, stride: int):
        self.taps, self.stride, self.samples, self.patches = taps, stride, 0, 0
        self._rest = np.empty(0, np.float32)
        self._sum, self._squares = 0.0, 0.0
        self._first, self._second = np.zeros(taps), np.zeros((taps, taps))

    def add(self, block: np.ndarray) -> None:
        """Add the next samples."""
        self.samples += len(block)
        exact = block.astype(np.float64)
        self._sum += exact.sum()
        self._squares += exact @ exact
        wave = np.concatenate([self._rest, block])
        number = max((len(wave) - self.taps) // self.stride + 1, 0)
        if number:
            windows = np.lib.stride_tricks.sliding_window_view(wave, self.taps)
            patches = windows[:: self.stride][:number].astype(np.float64)
            self._first += patches.sum(0)
            self._second += patches.T @ patches
            self.patches += number
        self._rest = wave[number * self.stride :]

    def norm(
        self, kernel: np.ndarray, scale: np.ndarray, bias: np.ndarray, normalised: bool
    ) -> Norm:
        """Return the norm of the wave, for a `kernel` [k, C] and the group norm's parameters [C].

        If `normalised`, the wave is first brought to mean 0 and variance 1.
        """
        offset, gain = 0.0, 1.0
        if normalised:
            offset = self._sum / self.samples
            gain = (self._squares / self.samples - offset**2 + FLOOR) ** -0.5
        mean = self._first / self.patches
        covariance = self._second / self.patches - np.outer(mean, mean)
        mean, covariance = (mean - offset) * gain, covariance * gain**2
        weight = kernel.astype(np.float64)
        variance = np.einsum("kl,kc,lc->c", covariance, weight, weight)
        factor = scale / np.sqrt(np.maximum(variance, 0) + EPSILON)
        shift = bias - mean @ weight * factor
        return Norm(offset, gain, factor.astype(np.float32), shift.astype(np.float32))
