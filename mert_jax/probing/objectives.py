"""Objectives of heads: the loss, and the quality that selects an epoch.

Both map logits [N, C] and targets [N, ...] to [N]. Shapes: N clips or frames, C outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class Objective(NamedTuple):
    """A loss of `outputs` = C logits, and a quality, None for minus the loss."""

    outputs: int
    loss: Callable[[Array, Any], Array]
    quality: Callable[[Array, Any], Array] | None = None


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def correct(logits: Array, target: Array) -> Array:
    """Return 1 for a correct class, less a little of the loss to break ties."""
    right = (jnp.argmax(logits, -1) == target).astype(jnp.float32)
    return right - 1e-3 * cross_entropy(logits, target)


def binary(logits: Array, target: Array) -> Array:
    """Return the binary cross-entropy of targets f32 [N, C] in [0, 1], averaged over outputs."""
    return optax.sigmoid_binary_cross_entropy(logits, target).mean(-1)


def squares(logits: Array, target: Array) -> Array:
    """Return the squared error of targets f32 [N, C], averaged over outputs."""
    return jnp.square(logits - target).mean(-1)


# loss and quality of each kind of task whose clips have one label
CLASSES, TAGS, VALUES = (cross_entropy, correct), (binary,), (squares,)
OF_KIND = {"classes": CLASSES, "key": CLASSES, "tags": TAGS, "regression": VALUES}
