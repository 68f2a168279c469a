"""The front end on each platform, and with a group norm that is known."""

import jax
import jax.numpy as jnp
import pytest

from mert_jax.models import feature_encoder


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 2), ("tpu", 1)])
def test_each_platform_has_its_form_alone(platform, convolutions):
    options = dict(conv_dim=8, kernels=(10, 3), strides=(5, 2), dtype=jnp.float32)
    small, wave = feature_encoder.FeatureEncoder(**options), jnp.zeros((1, 400))
    params = small.init(jax.random.key(0), wave)
    program = jax.jit(small.apply).trace(params, wave).lower(lowering_platforms=(platform,))
    assert program.as_text().count("stablehlo.convolution") == convolutions
