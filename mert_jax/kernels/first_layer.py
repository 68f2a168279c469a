"""First layer of the front end: convolution, group norm over time and GELU.

Shapes: B clips, N samples, T frames, C channels, k samples under a kernel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mert_jax.kernels.convolution import convolution
from mert_jax.kernels.gelu import gelu
from mert_jax.kernels.numerics import EPSILON, full_precision

Array = jax.Array


def first_layer(wave: Array, kernel: Array, scale: Array, bias: Array, stride: int) -> Array:
    """Return GELU of `normed_convolution_plain`: [B, T, C].

    The backward pass computes it again: this layer is the cheapest, with the largest arrays.
    """

    def recomputed(norm: Callable[..., Array]) -> Callable[..., Array]:
        return jax.checkpoint(lambda *arrays: gelu(norm(*arrays, stride), False))

    # TPU: the folded form never reads the convolution's result for its statistics
    forms = dict(tpu=normed_convolution_folded, default=normed_convolution_plain)
    forms = {platform: recomputed(norm) for platform, norm in forms.items()}
    return jax.lax.platform_dependent(wave, kernel, scale, bias, **forms)


def normed_convolution_plain(
    wave: Array, kernel: Array, scale: Array, bias: Array, stride: int
) -> Array:
    """Convolve `wave` [B, N] with `kernel` [k, C] and norm each clip and channel: [B, T, C].

    Mean and variance are over all frames, zero padding included; `scale` and `bias` are [C].
    """
    full = full_precision(wave.dtype)
    x = convolution(wave[..., None], kernel[:, None], stride).astype(full)
    x = x - x.mean(1, keepdims=True)
    variance = jnp.square(x).mean(1, keepdims=True)
    x = x * (jax.lax.rsqrt(variance + EPSILON) * scale[None, None]) + bias[None, None]
    return x.astype(wave.dtype)


def normed_convolution_folded(
    wave: Array, kernel: Array, scale: Array, bias: Array, stride: int
) -> Array:
    """Return `normed_convolution_plain`, its statistics from the samples, C / k times fewer.

    They follow from the mean and covariance of the k samples under the kernel.
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
    """Return the `length` samples under each frame of `wave` [B, N]: [B, T, length]."""
    frames = (wave.shape[-1] - length) // stride + 1
    strides_each = -(-length // stride)
    samples = (frames - 1 + strides_each) * stride
    padded = jnp.pad(wave, ((0, 0), (0, strides_each * stride - length)))  # enough for any N
    # whole strides side by side: a reshape and shifted copies instead of a gather
    rows = padded[:, :samples].reshape(wave.shape[0], -1, stride)
    shifted = [rows[:, i : i + frames] for i in range(strides_each)]
    return jnp.concatenate(shifted, -1)[..., :length]
