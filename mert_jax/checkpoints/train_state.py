"""The state in training checkpoints: a renamed field makes those on disk unreadable."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Guard(NamedTuple):
    """History of accepted and rejected updates, used to detect abnormal gradients."""

    norms: jax.Array  # gradient norms of the last W accepted updates, f32 [W], NaN where unused
    skipped: jax.Array  # number of updates rejected since the run began, i32
    streak: jax.Array  # number of consecutive updates rejected up to now, i32
    rollbacks: jax.Array  # number of times the run returned to an earlier checkpoint, i32


def initial_guard(window: int) -> Guard:
    """Return the guard of a new run, with room for `window` gradient norms."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.full((window,), jnp.nan, jnp.float32), zero, zero, zero)


class AdamState(NamedTuple):
    """Adam's update count and its first and second moments, shaped like the parameters."""

    count: jax.Array
    mu: optax.Params
    nu: optax.Params


class TrainState(NamedTuple):
    """The complete state of a training run."""

    step: jax.Array  # number of completed steps, i32
    batch: jax.Array  # index of the next batch, i32; ahead of `step` after a rollback
    params: Any
    opt_state: Any  # () in a converted checkpoint without moments
    guard: Guard
