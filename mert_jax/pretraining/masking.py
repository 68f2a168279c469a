"""Span masks over frames, and which frames of a padded clip count."""

import jax
import jax.numpy as jnp

Array = jax.Array


def trim_to_equal_counts(keys: Array, mask: Array, group: int) -> Array:
    """Drop random masked frames until every row of a group has as many as its poorest row.

    `keys` [B] are PRNG keys, `mask` bool [B, T], `group` divides B. fairseq's `require_same_masks`:
    single frames are dropped, so that spans break up; reproduced because it is in every MERT.
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
    """A random span mask, bool [B, length], True = hidden.

    `keys` [B] holds one PRNG key a row, `num_frames` int [B] the valid frames of each row, `group`
    the neighbouring rows trimmed to equal counts (the official group is one GPU's batch).
    Definition: fairseq, `data_utils.compute_mask_indices`, static lengths. Each row draws
    floor(mask_prob * frames / mask_length + U[0, 1)) starts without replacement from
    [0, frames - mask_length): the last valid frame is never masked, an upstream fault kept for
    parity.
    """
    draw_keys, start_keys, trim_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(
        keys
    )
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


def fairseq_frame_padding(valid_samples: Array, num_samples: int, length: int) -> Array:
    """Padded frames by fairseq's rule, bool [B, length]: all of a frame's equal share is padding.

    The wave is cut to a multiple of `length` and split in `length` equal chunks, which are not the
    frames' receptive fields (fairseq, `HubertModel.forward_padding_mask`).
    """
    chunk = num_samples // length
    return jnp.arange(length)[None, :] * chunk >= valid_samples[:, None]


def conv_frame_padding(
    valid_samples: Array, kernels: tuple[int, ...], strides: tuple[int, ...], length: int
) -> Array:
    """Padded frames by Hugging Face's rule, bool [B, length]: frames beyond those that the front
    end makes of the valid samples (`_get_feat_extract_output_lengths`)."""
    frames = valid_samples
    for kernel, stride in zip(kernels, strides, strict=True):
        frames = (frames - kernel) // stride + 1
    return jnp.arange(length)[None, :] >= frames[:, None]
