"""Masks: their invariants, and their statistics against an independent generator's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.pretraining import masking


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def draw(row_keys, num_frames, length, group, mask_length=5):
    return masking.span_mask(
        row_keys, num_frames, length, mask_prob=0.8, mask_length=mask_length, group=group
    )


def independent(rng, rows, frames, group):
    """The official recipe in numpy, row by row: choice without replacement, union, trim."""
    mask = np.zeros((rows, frames), bool)
    for row in mask:
        count = max(int(0.8 * frames / 5 + rng.random()), 2)
        starts = rng.choice(frames - 5, count, replace=False)
        row[(starts[:, None] + np.arange(5)).ravel()] = True
    for rows_of_group in mask.reshape(-1, group, frames):
        target = rows_of_group.sum(1).min()
        for row in rows_of_group:
            masked = np.flatnonzero(row)
            row[rng.choice(masked, len(masked) - target, replace=False)] = False
    return mask


def statistics(mask, group):
    """By group: masked fraction, runs a row, fraction of runs shorter than a span."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    runs = (edges == 1).sum(1)
    lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    owner = np.repeat(np.arange(len(mask)), runs) // group
    short = np.bincount(owner, lengths < 5) / np.bincount(owner)
    return np.stack(
        [mask.mean(1).reshape(-1, group).mean(1), runs.reshape(-1, group).mean(1), short]
    )


@pytest.mark.parametrize(("frames", "group"), [(374, 16), (383, 7)])
def test_statistics_are_those_of_an_independent_generator(frames, group):
    rows = 300 * group
    ours = statistics(np.asarray(draw(keys(rows), jnp.full(rows, frames), frames, group)), group)
    theirs = statistics(independent(np.random.default_rng(0), rows, frames, group), group)
    error = (ours.var(1) / 300 + theirs.var(1) / 300) ** 0.5
    assert (np.abs(ours.mean(1) - theirs.mean(1)) < 4 * error).all()


def test_rows_of_a_group_hide_equally_many_frames_and_groups_differ():
    mask = np.asarray(draw(keys(64), jnp.full(64, 374), 374, 16))
    counts = mask.sum(1).reshape(4, 16)
    assert (counts == counts[:, :1]).all()
    assert len(set(counts[:, 0])) > 1


def test_a_row_depends_on_its_key_and_its_group_alone():
    mask = np.asarray(draw(keys(8), jnp.full(8, 374), 374, 2))
    again = np.asarray(draw(keys(8)[2:6], jnp.full(4, 374), 374, 2))
    np.testing.assert_array_equal(mask[2:6], again)
    assert (mask[0] != mask[2]).any()


def test_the_last_valid_frame_is_never_hidden_nor_is_padding():
    valid = jnp.repeat(jnp.array([374, 300, 53, 12]), 500)
    mask = np.asarray(draw(keys(2000), valid, 374, 1))
    frames = np.arange(374)[None] >= np.asarray(valid)[:, None] - 1
    assert not mask[frames].any()
    # the one before it is, sometimes
    assert mask[np.arange(2000), np.asarray(valid) - 2].mean() > 0.05


def test_untrimmed_spans_are_whole():
    mask = np.asarray(draw(keys(500), jnp.full(500, 374), 374, 1))
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    assert lengths.min() == 5


def test_a_short_row_drags_its_group_down():
    mask = np.asarray(draw(keys(4), jnp.array([374, 60, 374, 374]), 374, 2)).sum(1)
    assert mask[0] == mask[1] < 60
    assert mask[2] == mask[3] > 150


def test_very_short_clips_still_hide_two_spans():
    mask = np.asarray(draw(keys(200), jnp.full(200, 12), 12, 1))
    assert (mask.sum(1) >= 6).all()


def test_trimming_keeps_a_subset_drawn_uniformly():
    mask = np.ones((8000, 20), bool)
    mask[1::2, 5:] = False  # every other row has 5 masked frames, its neighbour 20
    trimmed = np.asarray(masking.trim_to_equal_counts(keys(8000), jnp.asarray(mask), 2))
    assert (trimmed.sum(1) == 5).all()
    assert not (trimmed & ~mask).any()
    kept = trimmed[::2].mean(0)
    assert (np.abs(kept - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5).all()
