"""Where a frame is in its clip, by a wide grouped convolution over its neighbours.

Shapes: B clips, T frames, D width, k taps, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal

from mert_jax.models.layers import gelu
from mert_jax.sharding import on_each_shard

Array = jax.Array


class PosConvEmbed(nn.Module):
    """Positions by a grouped convolution with weight norm over each tap: [B, T, D] -> [B, T, D]."""

    kernel: int
    groups: int
    fitted_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        v_init = normal((4 / (self.kernel * width)) ** 0.5)
        shape = (self.kernel, width // self.groups, width)
        # whole on every device: the norm of a sharded weight would depend on the mesh
        v = self.param("weight_v", v_init, shape)
        g = self.param("weight_g", lambda _: jnp.linalg.norm(v, axis=(1, 2)))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        weight = v * (g[:, None, None] / jnp.linalg.norm(v, axis=(1, 2), keepdims=True))
        convolve = functools.partial(grouped_convolution, groups=self.groups)
        # not left to XLA: where the batch is split and `tensor` too, it made the gradient of a
        # grouped convolution's kernel as many times too large (jax 0.10 on CPUs)
        y = on_each_shard(convolve, x.astype(self.dtype), weight.astype(self.dtype))
        return gelu(y + bias.astype(self.dtype)[None, None, :], self.fitted_gelu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def grouped_convolution(x: Array, kernel: Array, groups: int) -> Array:
    """`x` [B, T, D] under `kernel` [k, D / G, D], centred: [B, T, D].

    An even kernel makes one frame too many: the official code drops the last one. XLA's gradients
    of it took 30 times as long as these on CPUs (of the kernel) and twice on TPUs (of `x`).
    """
    return _forward(x, kernel, groups)[0]


def _forward(x: Array, kernel: Array, groups: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel, groups, len(kernel) // 2), (x, kernel)


def _convolution(x: Array, kernel: Array, groups: int, before: int) -> Array:
    padding = [(before, len(kernel) - 1 - before)]
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def _backward(groups: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    taps, each, _ = kernel.shape
    before = taps // 2
    turned = jnp.swapaxes(kernel[::-1].reshape(taps, each, groups, each), 1, 3)
    # behind a barrier, or TPUs turn it again for every tile of the result
    turned = jax.lax.optimization_barrier(turned.reshape(kernel.shape))
    by_x = _convolution(gradient, turned, groups, taps - 1 - before)

    def by_kernel(x: Array, gradient: Array) -> Array:
        one_group = lambda kernel: _convolution(x, kernel, 1, before)
        return jax.linear_transpose(one_group, kernel[..., :each])(gradient)[0]

    pairs = zip(jnp.split(x, groups, -1), jnp.split(gradient, groups, -1), strict=True)
    return by_x, jnp.concatenate([by_kernel(*pair) for pair in pairs], -1)


grouped_convolution.defvjp(_forward, _backward)
