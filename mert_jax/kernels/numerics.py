"""Precision and epsilon of norms, shared by the kernels and the models."""

from typing import Any

import jax.numpy as jnp

EPSILON = 1e-5  # of every norm; flax's own default is 1e-6


def full_precision(dtype: Any) -> Any:
    """Return the dtype of norms, softmax, heads and losses: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
