"""Objectives of heads: the loss, and the quality that selects an epoch.

Shapes: N clips or frames, C outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class Objective(NamedTuple):
    """A loss and a quality of `outputs` = C logits.

    Both map logits [N, C] and targets [N, ...] to [N]. The mean quality on validation selects the
    epoch.
    """

    outputs: int
    loss: Callable[[Array, Any], Array]
    quality: Callable[[Array, Any], Array]


def cross_entropy(logits: Array, target: Array) -> Array:
    """Return the cross-entropy of class indices int32 [N]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


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


def negative(loss: Callable[[Array, Any], Array]) -> Callable[[Array, Any], Array]:
    """Return the quality that is minus a loss."""
    return lambda logits, target: -loss(logits, target)


def classes(count: int) -> Objective:
    """Return the objective of one of `count` classes."""
    return Objective(count, cross_entropy, correct)


def tags(count: int) -> Objective:
    """Return the objective of any of `count` tags."""
    return Objective(count, binary, _NEGATIVE_BINARY)


def values(count: int) -> Objective:
    """Return the objective of `count` standardised numbers."""
    return Objective(count, squares, _NEGATIVE_SQUARES)


# created once: jit caches programs by the identity of the objective's functions
_NEGATIVE_BINARY, _NEGATIVE_SQUARES = negative(binary), negative(squares)
