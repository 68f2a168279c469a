"""The positional convolution's own gradients against XLA's."""

import functools

import jax
import numpy as np
import pytest

from mert_jax.models import pos_conv_embed


def plain(x, kernel, groups):
    taps = kernel.shape[0]
    padding = [(taps // 2, taps - 1 - taps // 2)]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        padding,
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize("taps", [1, 6, 7, 40])
@pytest.mark.parametrize("groups", [1, 3])
def test_gradients(taps, groups):
    width, frames = 12, 20
    keys = jax.random.split(jax.random.key(0), 3)
    x, gradient = (jax.random.normal(key, (2, frames, width)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (taps, width // groups, width))

    def pulled(function):
        y, pull = jax.vjp(functools.partial(function, groups=groups), x, kernel)
        return y, *pull(gradient)

    for ours, xlas in zip(pulled(pos_conv_embed.grouped_convolution), pulled(plain), strict=True):
        assert ours.shape == xlas.shape
        np.testing.assert_allclose(ours, xlas, rtol=1e-5, atol=1e-4)
