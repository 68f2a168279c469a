"""Which updates are accepted, and what the guard remembers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.checkpoints.train_state import initial_guard
from mert_jax.pretraining import guard


def seen(norms, window=16):
    state = initial_guard(window)
    for norm in norms:
        state = guard.after(state, jnp.float32(norm), jnp.bool_(True))
    return state


@pytest.mark.parametrize(
    ("loss", "norm", "accepted"),
    [
        (1.0, 29.0, True),
        (1.0, 31.0, False),  # more than 10 times the median, 3
        (np.nan, 1.0, False),
        (np.inf, 1.0, False),
        (1.0, np.nan, False),
        (1.0, np.inf, False),
    ],
)
def test_what_is_not_finite_or_far_beyond_the_median_is_refused(loss, norm, accepted):
    state = seen([1, 2, 3, 4, 100])
    assert bool(guard.accepts(state, jnp.float32(loss), jnp.float32(norm), 10.0)) == accepted


def test_factor_0_refuses_only_what_is_not_finite():
    state = seen([1] * 16)
    assert guard.accepts(state, jnp.float32(1), jnp.float32(1e30), 0.0)
    assert not guard.accepts(state, jnp.float32(1), jnp.float32(np.inf), 0.0)


def test_nothing_is_out_of_line_before_an_eighth_of_the_window_is_known():
    assert np.isinf(guard.limit(seen([1]), 10.0))
    assert guard.limit(seen([1, 1]), 10.0) == 10


def test_the_window_forgets():
    assert guard.limit(seen([1] * 16 + [5] * 16), 2.0) == 10


def test_what_is_skipped_is_counted_and_not_remembered():
    state = seen([2, 2])
    for norm in (np.nan, 1000.0):
        state = guard.after(state, jnp.float32(norm), jnp.bool_(False))
    assert (int(state.skipped), int(state.streak)) == (2, 2)
    assert guard.limit(state, 1.0) == 2
    state = guard.after(state, jnp.float32(2), jnp.bool_(True))
    assert (int(state.skipped), int(state.streak)) == (2, 0)
