"""Centred grouped convolution with gradients of its own.

Shapes: B clips, T frames, D width, k taps, G groups.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def grouped_convolution_plain(x: Array, kernel: Array, groups: int) -> Array:
    """Convolve `x` [B, T, D] with `kernel` [k, D / G, D], centred: [B, T, D]."""
    # an even kernel makes one frame too many: the official code drops the last one
    return _convolution(x, kernel, groups, len(kernel) // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_convolution(x: Array, kernel: Array, groups: int) -> Array:
    """Return `grouped_convolution_plain`."""
    return grouped_convolution_plain(x, kernel, groups)


def _forward(x: Array, kernel: Array, groups: int) -> tuple[Array, tuple[Array, Array]]:
    return grouped_convolution_plain(x, kernel, groups), (x, kernel)


def _convolution(x: Array, kernel: Array, groups: int, before: int) -> Array:
    padding = [(before, len(kernel) - 1 - before)]
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def _backward(groups: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # XLA's own gradients took 30 times as long on CPUs (of `kernel`) and twice on TPUs (of `x`)
    x, kernel = residuals
    taps, width, _ = kernel.shape  # of one group
    before = taps // 2
    flipped = jnp.swapaxes(kernel[::-1].reshape(taps, width, groups, width), 1, 3)
    # TPU: without the barrier the kernel is flipped again for every tile of the result
    flipped = jax.lax.optimization_barrier(flipped.reshape(kernel.shape))
    by_x = _convolution(gradient, flipped, groups, taps - 1 - before)

    def by_kernel(x: Array, gradient: Array) -> Array:
        def one_group(kernel):
            return _convolution(x, kernel, 1, before)

        return jax.linear_transpose(one_group, kernel[..., :width])(gradient)[0]

    pairs = zip(jnp.split(x, groups, -1), jnp.split(gradient, groups, -1), strict=True)
    return by_x, jnp.concatenate([by_kernel(*pair) for pair in pairs], -1)


grouped_convolution.defvjp(_forward, _backward)
