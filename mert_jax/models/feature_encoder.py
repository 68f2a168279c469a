"""The convolutional front end, from samples to frames.

Shapes: B clips, N samples, T frames, C channels, k samples under a kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mert_jax.models.layers import EPSILON, conv_init, full_precision, gelu, logical

Array = jax.Array


PIECE = 384  # frames that go through the front end at a time where nothing ties them together


def receptive_field(kernels: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Samples that a frame hears, the fewest that make one."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


class FeatureEncoder(nn.Module):
    """Seven strided convolutions, the first one group-normed over time: [B, N] -> [B, T, C].

    With `norm`, the factor and shift [B, C] that the group norm comes to (`group_norm.affine`), the
    clips may be parts of longer ones, or end in samples that do not count.
    """

    conv_dim: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    fitted_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, wave: Array, norm: tuple[Array, Array] | None = None) -> Array:
        if norm is not None:
            weights = [
                _Kernel((kernel, self.conv_dim if i else 1, self.conv_dim), name=f"conv_layers_{i}")
                for i, kernel in enumerate(self.kernels)
            ]
            weights = [weight().astype(self.dtype) for weight in weights]
            wave = wave.astype(self.dtype)
            return in_pieces(wave, weights, self.strides, *norm, self.fitted_gelu)
        x = wave[..., None].astype(self.dtype)
        for i, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
            shape = (kernel, x.shape[-1], self.conv_dim)
            weight = _Kernel(shape, name=f"conv_layers_{i}")().astype(self.dtype)
            if i == 0:
                scale, bias = _Affine(self.conv_dim, name="layer_norm")()
                x = normed_convolution(
                    x[..., 0], weight[:, 0], scale, bias, stride, self.fitted_gelu
                )
            else:
                x = gelu(convolution(x, weight, stride), self.fitted_gelu)
            self.sow("intermediates", f"conv_layer{i}", x)
        return x


class _Kernel(nn.Module):
    """The kernel of a convolution, [k, C in, C out]."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", logical(conv_init, None, None, "embed"), self.shape)


class _Affine(nn.Module):
    """What a norm multiplies by and adds, [C] each."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        scale = self.param("scale", nn.initializers.ones, (self.channels,))
        return scale, self.param("bias", nn.initializers.zeros, (self.channels,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(x: Array, kernel: Array, stride: int) -> Array:
    """`x` [B, N, C in] under `kernel` [k, C in, C out] every `stride`, without padding."""
    return _convolution(x, kernel, stride)


def _convolution(x, kernel, stride, padding="VALID"):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,), padding, dimension_numbers=numbers)


def _forward(x, kernel, stride):
    return _convolution(x, kernel, stride), (x, kernel)


def _backward(stride, kept, gradient):
    x, kernel = kept
    by_x = lambda kernel, gradient: jax.linear_transpose(
        lambda x: _convolution(x, kernel, stride), x
    )(gradient)[0]
    in_phases = functools.partial(gradient_in_phases, stride=stride, length=x.shape[1])
    by_kernel = jax.linear_transpose(lambda kernel: _convolution(x, kernel, stride), kernel)
    return (
        jax.lax.platform_dependent(kernel, gradient, cpu=in_phases, default=by_x),
        by_kernel(gradient)[0],
    )


convolution.defvjp(_forward, _backward)


def gradient_in_phases(kernel: Array, gradient: Array, stride: int, length: int) -> Array:
    """The gradient by `convolution`'s `x` [B, length, C in] from that by its result, for CPUs.

    There XLA puts zeros between the frames of `gradient` and multiplies those too; the samples of
    one phase of the stride meet only their own taps of the kernel.
    """
    pieces = -(-len(kernel) // stride)
    number = gradient.shape[1] + pieces - 1
    found = jnp.zeros((len(gradient), number, stride, kernel.shape[1]), gradient.dtype)
    for phase in range(min(stride, len(kernel))):
        taps = jnp.swapaxes(kernel[phase::stride][::-1], 1, 2)
        own = _convolution(gradient, taps, 1, [(len(taps) - 1, pieces - 1)])
        found = found.at[:, :, phase].set(own)
    found = found.reshape(len(gradient), -1, kernel.shape[1])[:, :length]
    return jnp.pad(found, ((0, 0), (0, length - found.shape[1]), (0, 0)))


def normed_convolution(
    wave: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    stride: int,
    fitted_gelu: bool,
) -> Array:
    """The first layer: `wave` [B, N] under `kernel` [k, C], normed for each clip and channel over
    all frames (zero padding included), times `scale` plus `bias` [C], then GELU: [B, T, C].

    The backward pass computes it again: of all layers it is the cheapest, with the largest arrays.
    """

    def recomputed(form: Callable[..., Array]) -> Callable[..., Array]:
        return jax.checkpoint(lambda *arrays: gelu(form(*arrays, stride), fitted_gelu, False))

    return jax.lax.platform_dependent(
        wave, kernel, scale, bias, tpu=recomputed(folded), default=recomputed(two_pass)
    )


def in_pieces(
    wave: Array,
    weights: list[Array],
    strides: tuple[int, ...],
    factor: Array,
    shift: Array,
    fitted_gelu: bool,
) -> Array:
    """The front end with a group norm that is known, `PIECE` frames at a time: [B, N] -> [B, T, C].

    Memory does not grow with N beyond the result's, and CPUs' caches hold more of a piece.
    """
    kernels = tuple(len(weight) for weight in weights)
    hop, field = math.prod(strides), receptive_field(kernels, strides)
    frames = (wave.shape[1] - field) // hop + 1

    def encoded(x: Array) -> Array:
        x = convolution(x[..., None], weights[0], strides[0])
        x = x * factor[:, None].astype(x.dtype) + shift[:, None].astype(x.dtype)
        for weight, stride in zip(weights[1:], strides[1:], strict=True):
            x = convolution(gelu(x, fitted_gelu), weight, stride)
        return gelu(x, fitted_gelu)

    if frames <= PIECE:
        return encoded(wave)
    number = -(-frames // PIECE)
    size = (PIECE - 1) * hop + field
    missing = (number - 1) * PIECE * hop + size - wave.shape[1]
    wave = jnp.pad(wave, ((0, 0), (0, max(missing, 0))))
    piece = lambda i: encoded(jax.lax.dynamic_slice_in_dim(wave, i * PIECE * hop, size, axis=1))
    features = jnp.moveaxis(jax.lax.map(piece, jnp.arange(number)), 0, 1)
    return features.reshape(wave.shape[0], -1, features.shape[-1])[:, :frames]


def two_pass(wave: Array, kernel: Array, scale: Array, bias: Array, stride: int) -> Array:
    """`normed_convolution` before its activation, as it is defined."""
    full = full_precision(wave.dtype)
    x = convolution(wave[..., None], kernel[:, None], stride).astype(full)
    x = x - x.mean(1, keepdims=True)
    variance = jnp.square(x).mean(1, keepdims=True)
    x = x * (jax.lax.rsqrt(variance + EPSILON) * scale[None, None]) + bias[None, None]
    return x.astype(wave.dtype)


def folded(wave: Array, kernel: Array, scale: Array, bias: Array, stride: int) -> Array:
    """`two_pass` that never reads the convolution's result for its statistics.

    A channel's mean and variance follow from the mean and covariance of the k samples under the
    kernel, of which there are C / k times fewer.
    """
    full = full_precision(wave.dtype)
    exact = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=full)
    x = patches(wave, len(kernel), stride)
    mean = x.astype(full).mean(1)
    second = jnp.einsum("btk,btl->bkl", x, x, **exact) / x.shape[1]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    weight = kernel.astype(full)
    variance = jnp.einsum("bkl,kc,lc->bc", covariance, weight, weight, **exact)
    # rounding may leave a constant channel's variance below zero
    factor = jax.lax.rsqrt(jnp.maximum(variance, 0) + EPSILON) * scale[None]
    shift = bias[None] - jnp.einsum("bk,kc->bc", mean, weight, **exact) * factor
    y = jnp.einsum("btk,kc->btc", x, kernel, preferred_element_type=full)
    return (y * factor[:, None] + shift[:, None]).astype(wave.dtype)


def patches(wave: Array, length: int, stride: int) -> Array:
    """The `length` samples under each frame of `wave` [B, N]: [B, T, length]."""
    frames = (wave.shape[-1] - length) // stride + 1
    pieces = -(-length // stride)
    samples = (frames - 1 + pieces) * stride
    padded = jnp.pad(wave, ((0, 0), (0, pieces * stride - length)))  # enough for any N
    # whole strides side by side: a reshape and shifted copies instead of a gather
    rows = padded[:, :samples].reshape(wave.shape[0], -1, stride)
    return jnp.concatenate([rows[:, i : i + frames] for i in range(pieces)], -1)[..., :length]
