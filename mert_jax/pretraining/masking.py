"""Span masks over frames."""

import jax
import jax.numpy as jnp

Array = jax.Array


def trim_to_equal_counts(keys: Array, mask: Array, group: int) -> Array:
    """Drop random frames of `mask` [B, T] until all rows of a group have the same number.

    fairseq's `require_same_masks` breaks spans up in this way, and every MERT was trained so.
    """
    target = mask.sum(-1).reshape(-1, group).min(-1).repeat(group)
    scores = jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys)
    rank = jnp.argsort(jnp.argsort(jnp.where(mask, scores, jnp.inf), -1), -1)
    return mask & (rank < target[:, None])


def span_mask(
    keys: Array,
    num_frames: Array,
    length: int,
    *,
    mask_prob: float,
    mask_length: int,
    group: int,
    min_masks: int = 2,
) -> Array:
    """Return a random span mask, bool [B, length], True at frames to hide.

    `keys` [B] are PRNG keys, `num_frames` int [B] valid frames; `group` neighbouring rows
    (officially one GPU's batch) are trimmed to equal counts. Each row draws
    floor(mask_prob * frames / mask_length + U[0, 1)) starts, at least `min_masks`, without
    replacement from [0, frames - mask_length) (fairseq, `data_utils.compute_mask_indices`, static
    lengths). The last valid frame is never masked: an error upstream, kept for parity.
    """
    split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)
    draw_keys, start_keys, trim_keys = split(keys)
    dither = jax.vmap(jax.random.uniform)(draw_keys)
    num_spans = jnp.floor(mask_prob * num_frames / mask_length + dither).astype(jnp.int32)
    num_spans = jnp.maximum(num_spans, min_masks)
    choices = jnp.where(
        num_frames - mask_length > num_spans, num_frames - mask_length, num_spans + 1
    )
    frames = jnp.arange(length)[None, :]
    scores = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(start_keys)
    scores = jnp.where(frames < choices[:, None], scores, jnp.inf)
    # the n smallest of independent uniforms are a uniform draw without replacement
    starts = jnp.argsort(jnp.argsort(scores, -1), -1) < num_spans[:, None]
    padded = jnp.pad(starts, ((0, 0), (mask_length - 1, 0)))
    mask = jnp.stack([padded[:, i : i + length] for i in range(mask_length)]).any(0)
    mask &= frames < num_frames[:, None]
    return trim_to_equal_counts(trim_keys, mask, group)
