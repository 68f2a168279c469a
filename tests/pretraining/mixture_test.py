"""The in-batch noise mixture against plain loops, and what its numbers mean."""

import functools

import jax
import numpy as np
import pytest

from mert_jax.pretraining import mixture


def draws(rows, samples, group, prob=0.5, count=(1, 3), length=(40, 90), seed=0):
    def draw(key):
        keys = jax.random.split(key, rows)
        return mixture.draw(keys, samples, group, prob=prob, count=count, length=length)

    return jax.jit(draw)(jax.random.key(seed))


@functools.partial(jax.jit, static_argnames=("group", "volume"))
def mix(wave, drawn, group, volume):
    return mixture.mix(wave, drawn, group=group, max_length=90, volume=volume)


def plainly(wave, drawn, group, volume):
    """The definition: slices of the concatenation of the group's other clips."""
    noisy = wave.copy()
    for row in range(len(wave)):
        first = row // group * group
        others = [wave[i] for i in range(first, first + group) if i != row]
        if not drawn.mixed[row]:
            continue
        pool = np.concatenate(others)
        for i in range(int(drawn.count[row])):
            start, duration, at = (
                int(x[row, i]) for x in (drawn.starts, drawn.durations, drawn.positions)
            )
            noisy[row, at : at + duration] += volume * pool[start : start + duration]
    return noisy


@pytest.mark.parametrize("group", [2, 3, 4])
def test_it_is_what_plain_slices_give(group):
    wave = np.random.default_rng(0).normal(size=(24, 200)).astype(np.float32)
    drawn = draws(24, 200, group)
    ours = mix(wave, drawn, group, 0.7)
    np.testing.assert_allclose(ours, plainly(wave, drawn, group, 0.7), atol=1e-6)
    changed = (np.asarray(ours) != wave).any(1)
    np.testing.assert_array_equal(changed, drawn.mixed)


def test_the_probability_is_that_of_being_mixed():
    # upstream's mixture_prob is that of being left alone
    assert draws(4000, 200, 2, prob=0.0).mixed.sum() == 0
    assert draws(4000, 200, 2, prob=1.0).mixed.all()
    assert abs(draws(4000, 200, 2, prob=0.2).mixed.mean() - 0.2) < 4 * 0.4 / 4000**0.5


def test_draws_reach_both_ends_of_their_ranges():
    drawn = draws(20_000, 100, 3, length=(40, 90))
    assert (drawn.count.min(), drawn.count.max()) == (1, 3)
    assert (drawn.durations.min(), drawn.durations.max()) == (40, 90)
    assert (drawn.starts.min(), drawn.starts.max()) == (0, 2 * 100 - 90)
    assert drawn.positions.min() == 0
    assert (drawn.positions + drawn.durations).max() == 100
    counts = np.bincount(drawn.count)[1:] / 20_000
    assert (abs(counts - 1 / 3) < 4 * (2 / 9 / 20_000) ** 0.5).all()


def test_a_row_depends_on_its_key_alone():
    few, many = draws(4, 200, 2), draws(4, 200, 2)
    jax.tree.map(np.testing.assert_array_equal, few, many)
    wave = np.random.default_rng(0).normal(size=(4, 200)).astype(np.float32)
    whole = mix(wave, draws(4, 200, 2, prob=1.0), 2, 1.0)
    half = jax.tree.map(lambda x: x[2:], draws(4, 200, 2, prob=1.0))
    np.testing.assert_allclose(mix(wave[2:], half, 2, 1.0), whole[2:], atol=1e-6)
