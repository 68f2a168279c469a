"""Convolutional front end, from samples to frames.

Shapes: B clips, N samples, T frames, C channels, k samples under a kernel.
"""

import math
from typing import Any

import jax
from flax import linen as nn

from mert_jax.kernels.blocks import map_blocks
from mert_jax.kernels.convolution import convolution
from mert_jax.kernels.first_layer import first_layer
from mert_jax.kernels.gelu import gelu
from mert_jax.models.layers import conv_init, logical

Array = jax.Array


def receptive_field(kernels: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of samples that one frame depends on."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


class FeatureEncoder(nn.Module):
    """Seven strided convolutions, the first one group-normed over time: [B, N] -> [B, T, C].

    `norm` is the factor and shift [B, C] of the group norm where clips are parts of recordings of
    which they are known (`extraction.group_norm`).
    """

    conv_dim: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, wave: Array, norm: tuple[Array, Array] | None = None) -> Array:
        weights = [
            _Kernel((kernel, self.conv_dim if i else 1, self.conv_dim), name=f"conv_layers_{i}")
            for i, kernel in enumerate(self.kernels)
        ]
        wave = wave.astype(self.dtype)
        if norm is not None:
            weights = [weight().astype(self.dtype) for weight in weights]
            return encode_normed(wave, weights, self.strides, *norm)
        x = wave
        for i, (kernel, stride) in enumerate(zip(weights, self.strides, strict=True)):
            weight = kernel().astype(self.dtype)
            if i == 0:
                scale, bias = _Affine(self.conv_dim, name="layer_norm")()
                x = first_layer(x, weight[:, 0], scale, bias, stride)
            else:
                x = gelu(convolution(x, weight, stride))
            self.sow("intermediates", f"conv_layer{i}", x)
        return x


class _Kernel(nn.Module):
    """Kernel of a convolution, [k, C in, C out]."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", logical(conv_init, None, None, "embed"), self.shape)


class _Affine(nn.Module):
    """Scale and bias of a norm, [C] each."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        scale = self.param("scale", nn.initializers.ones, (self.channels,))
        return scale, self.param("bias", nn.initializers.zeros, (self.channels,))


def encode_normed(
    wave: Array, weights: list[Array], strides: tuple[int, ...], factor: Array, shift: Array
) -> Array:
    """Run the front end with a known group norm, in blocks of frames: [B, N] -> [B, T, C]."""

    def encode(x: Array) -> Array:
        x = convolution(x[..., None], weights[0], strides[0])
        x = x * factor[:, None].astype(x.dtype) + shift[:, None].astype(x.dtype)
        for weight, stride in zip(weights[1:], strides[1:], strict=True):
            x = convolution(gelu(x), weight, stride)
        return gelu(x)

    kernels = tuple(len(weight) for weight in weights)
    return map_blocks(encode, wave, math.prod(strides), receptive_field(kernels, strides))
