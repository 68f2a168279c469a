"""A function from samples to frames, applied to a long wave in blocks of frames."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
FRAMES = 384  # frames in a block


def map_blocks(
    encode: Callable[[Array], Array], wave: Array, hop_length: int, receptive_field: int
) -> Array:
    """Return `encode(wave)`, [B, N] -> [B, T, C], computed `FRAMES` frames at a time.

    Frame t of `encode` reads only the `receptive_field` samples from `hop_length` * t on. Memory
    does not grow with N beyond the result, and a block stays in the cache of a CPU.
    """
    frames = (wave.shape[1] - receptive_field) // hop_length + 1
    if frames <= FRAMES:
        return encode(wave)
    number = -(-frames // FRAMES)
    step = FRAMES * hop_length
    size = (FRAMES - 1) * hop_length + receptive_field
    missing = (number - 1) * step + size - wave.shape[1]
    wave = jnp.pad(wave, ((0, 0), (0, max(missing, 0))))

    def block(i: Array) -> Array:
        return encode(jax.lax.dynamic_slice_in_dim(wave, i * step, size, axis=1))

    features = jnp.moveaxis(jax.lax.map(block, jnp.arange(number)), 0, 1)
    return features.reshape(wave.shape[0], -1, features.shape[-1])[:, :frames]
