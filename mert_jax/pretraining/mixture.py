"""In-batch noise mixture: segments of neighbouring clips added to a clip as noise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Range = tuple[int, int]  # both ends included


class Draws(NamedTuple):
    """The random choices of a mixture with at most S segments a row."""

    mixed: Array  # rows that get noise, bool [B]
    count: Array  # number of segments, int [B]
    starts: Array  # first sample of each segment in the pool of the group's other clips, int [B, S]
    durations: Array  # samples of each segment, int [B, S]
    positions: Array  # sample of the clip at which each segment is added, int [B, S]


def draw(
    keys: Array, num_samples: int, group: int, *, prob: float, count: Range, length: Range
) -> Draws:
    """Draw the mixture of each row from its PRNG key in `keys` [B].

    With probability `prob` (upstream: 1 - mixture_prob) a row gets `count` segments of `length`
    samples, from a pool of `group` - 1 clips of `num_samples`.
    """
    pool = (group - 1) * num_samples

    def row(key: Array) -> Draws:
        keys = jax.random.split(key, 5)
        mixed = jax.random.uniform(keys[0]) < prob
        number = jax.random.randint(keys[1], (), count[0], count[1] + 1)
        starts = jax.random.randint(keys[2], (count[1],), 0, pool - length[1] + 1)
        durations = jax.random.randint(keys[3], (count[1],), length[0], length[1] + 1)
        positions = jax.random.randint(keys[4], (count[1],), 0, num_samples - durations + 1)
        return Draws(mixed, number, starts, durations, positions)

    return jax.vmap(row)(keys)


def mix(wave: Array, draws: Draws, *, group: int, max_length: int, volume: float) -> Array:
    """Add the drawn segments to `wave` f32 [B, N], within groups of `group` neighbouring clips.

    A row's pool is the group's other clips, unmixed and joined; nothing is renormalised or clipped.
    Source: yizhilll/MERT, `mert_fairseq`, which also mixes in evaluation.
    """
    num_samples = wave.shape[-1]
    offsets = jnp.arange(max_length)

    def segment(pool: Array, own: Array, start: Array, duration: Array) -> Array:
        # `pool` includes the row's own clip: from there on, read one clip further
        before = jax.lax.dynamic_slice(pool, (start,), (max_length,))
        after = jax.lax.dynamic_slice(pool, (start + num_samples,), (max_length,))
        part = jnp.where(start + offsets < own * num_samples, before, after)
        return jnp.where(offsets < duration, part, 0)

    def row(clip: Array, pool: Array, own: Array, draws: Draws) -> Array:
        noisy = jnp.pad(clip, (0, max_length))
        for i in range(draws.starts.shape[0]):
            part = segment(pool, own, draws.starts[i], draws.durations[i])
            part = jnp.where(draws.mixed & (i < draws.count), volume * part, 0)
            silence = jnp.zeros_like(noisy)
            noisy += jax.lax.dynamic_update_slice(silence, part, (draws.positions[i],))
        return noisy[:num_samples]

    def one_group(clips: Array, draws: Draws) -> Array:
        # padded, so that a slice near the end is never clamped back
        pool = jnp.pad(clips.reshape(-1), (0, max_length))
        return jax.vmap(row, in_axes=(0, None, 0, 0))(clips, pool, jnp.arange(group), draws)

    def grouped(x: Array) -> Array:
        return x.reshape(-1, group, *x.shape[1:])

    noisy = jax.vmap(one_group)(grouped(wave), jax.tree.map(grouped, draws))
    return noisy.reshape(wave.shape)
