"""The optimiser's official peculiarities, each seen alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, large
from mert_jax.checkpoints.train_state import AdamState
from mert_jax.pretraining import build, optimizer


@pytest.mark.parametrize(
    ("config", "peak", "clip"), [(base, 5e-4, 10.0), (large, 1.5e-3, 1.0)], ids=["base", "large"]
)
def test_the_recipes_have_the_official_numbers(config, peak, clip):
    config = config.get_config()
    schedule = build.make_schedule(config)
    rates = [schedule(jnp.asarray(k)) for k in (0, 1, 16_000, 32_000, 216_000, 400_000, 500_000)]
    np.testing.assert_allclose(
        rates, [0, peak / 32_000, peak / 2, peak, peak / 2, 0, 0], rtol=1e-6, atol=0
    )
    o = config.optimizer
    assert (o.clip_norm, o.b1, o.b2, o.eps, o.weight_decay) == (clip, 0.9, 0.98, 1e-6, 0.01)


def one_update(params, grads, rate, **options):
    official = optimizer.make(lambda count: rate, **dict(clip_norm=1e9) | options)
    updates, state = official.update(grads, official.init(params), params)
    return optax.apply_updates(params, updates), state


def test_epsilon_joins_the_uncorrected_root():
    grads, params = {"w": jnp.full(3, 1e-6)}, {"w": jnp.zeros(3)}
    after, _ = one_update(params, grads, 1.0, weight_decay=0.0)
    expected = 0.02**0.5 / 0.1 * (0.1 * 1e-6) / (0.02**0.5 * 1e-6 + 1e-6)
    np.testing.assert_allclose(after["w"], -expected, rtol=1e-5)
    textbook = optax.adam(1.0, 0.9, 0.98, 1e-6)
    updates, _ = textbook.update(grads, textbook.init(params), params)
    assert abs(updates["w"][0] / -expected - 1) > 0.5


def test_decay_is_of_the_old_value_and_spares_nothing():
    params = {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)}
    grads = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    after, _ = one_update(params, grads, 0.5, weight_decay=0.01)
    for value in after.values():
        np.testing.assert_allclose(value, 4 - 0.5 * 0.01 * 4, rtol=1e-6)


@pytest.mark.parametrize(("norm", "scale"), [(5.0, 1.0), (50.0, 10 / (50 + 1e-6))])
def test_clipping(norm, scale):
    grads = {"a": jnp.asarray([0.6 * norm]), "b": jnp.asarray([0.8 * norm])}
    clipped, _ = optimizer.clip_by_global_norm(10.0).update(grads, None)
    np.testing.assert_allclose(clipped["a"], 0.6 * norm * scale, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], 0.8 * norm * scale, rtol=1e-6)


def test_a_rate_of_zero_moves_the_moments_only():
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    after, state = one_update(params, grads, 0.0)
    np.testing.assert_array_equal(after["w"], params["w"])
    adam = next(s for s in state if isinstance(s, AdamState))
    np.testing.assert_allclose(adam.mu["w"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(adam.nu["w"], 0.02, rtol=1e-5)
    assert adam.count == 1


def test_no_warmup_starts_at_the_peak():
    schedule = optimizer.warmup_linear_decay(1.0, 0, 10)
    np.testing.assert_allclose([schedule(jnp.asarray(k)) for k in (0, 5, 10)], [1.0, 0.5, 0.0])
