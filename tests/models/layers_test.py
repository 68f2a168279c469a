"""The norm where its mean is far from zero."""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.models import layers


def test_norm_of_numbers_far_from_zero():
    """Mean and mean square in one pass lose what the square of mean over spread says."""
    x = 10 + jax.random.normal(jax.random.key(0), (20, 768))
    norm = layers.Norm(jnp.float32)
    ours = norm.apply(norm.init(jax.random.key(1), x), x)
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + layers.EPSILON)
    np.testing.assert_allclose(ours, exact, atol=1e-4)
