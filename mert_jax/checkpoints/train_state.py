"""Everything that a checkpoint of a run holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class Guard(NamedTuple):
    """norms: gradient norms of the last W updates that were accepted, [W], NaN before there are so
    many; skipped: updates that were not, since the run began; streak: of them, those in a row until
    now; rollbacks: times that the run went back to an earlier checkpoint."""

    norms: Array
    skipped: Array
    streak: Array
    rollbacks: Array


def initial_guard(window: int) -> Guard:
    """A guard that has seen nothing yet, and remembers `window` norms."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.full((window,), jnp.nan, jnp.float32), zero, zero, zero)


class AdamState(NamedTuple):
    count: jax.Array
    mu: optax.Params
    nu: optax.Params


def optimizer_state(adam: AdamState, updates: int | jax.Array) -> tuple[Any, ...]:
    """The state of `make`'s optimiser with these moments, `updates` into its schedule."""
    empty = optax.EmptyState()
    return empty, adam, empty, optax.ScaleByScheduleState(jnp.asarray(updates, jnp.int32))


class TrainState(NamedTuple):
    """Everything a checkpoint holds: completed steps, the number of the next batch (further on than
    the step where batches were passed over), parameters, optimiser state, and the guard."""

    step: Array
    batch: Array
    params: Any
    opt_state: Any
    guard: Guard
