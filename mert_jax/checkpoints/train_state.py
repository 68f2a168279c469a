"""The state that a training checkpoint stores.

Checkpoints on disk contain these classes' field names: a renamed field makes them unreadable.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Guard(NamedTuple):
    """History of accepted and rejected updates, used to detect abnormal gradients.

    norms: gradient norms of the last W accepted updates, f32 [W], NaN in unused entries
    skipped: number of updates rejected since the run began, i32
    streak: number of consecutive updates rejected up to now, i32
    rollbacks: number of times the run returned to an earlier checkpoint, i32
    """

    norms: jax.Array
    skipped: jax.Array
    streak: jax.Array
    rollbacks: jax.Array


def initial_guard(window: int) -> Guard:
    """Return the guard of a new run, with room for `window` gradient norms."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.full((window,), jnp.nan, jnp.float32), zero, zero, zero)


class AdamState(NamedTuple):
    """Adam's update count and its first and second moments, shaped like the parameters."""

    count: jax.Array
    mu: optax.Params
    nu: optax.Params


def optimizer_state(adam: AdamState, updates: int | jax.Array) -> tuple[Any, ...]:
    """Return the state of `optimizer.make`'s chain with these moments after `updates` updates."""
    empty = optax.EmptyState()
    return empty, adam, empty, optax.ScaleByScheduleState(jnp.asarray(updates, jnp.int32))


class TrainState(NamedTuple):
    """The complete state of a training run.

    step: number of completed steps, i32
    batch: index of the next batch, i32; ahead of `step` once a rollback has skipped batches
    params: the student's parameters
    opt_state: the optimizer's state; () in a converted checkpoint without moments
    guard: history of accepted and rejected updates
    """

    step: jax.Array
    batch: jax.Array
    params: Any
    opt_state: Any
    guard: Guard
