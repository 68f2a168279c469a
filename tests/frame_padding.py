"""The padded frames of a clip that was filled up, by the rules of fairseq and Hugging Face."""

import jax
import jax.numpy as jnp

Array = jax.Array


def fairseq_frame_padding(valid_samples: Array, num_samples: int, length: int) -> Array:
    """Return fairseq's padded frames, bool [B, length]: those whose share of the wave is padding.

    The wave is cut to a multiple of `length` and split into `length` equal chunks, which are not
    the receptive fields of the frames (fairseq, `HubertModel.forward_padding_mask`).
    """
    chunk = num_samples // length
    return jnp.arange(length)[None, :] * chunk >= valid_samples[:, None]


def conv_frame_padding(
    valid_samples: Array, kernels: tuple[int, ...], strides: tuple[int, ...], length: int
) -> Array:
    """Return Hugging Face's padded frames, bool [B, length].

    They follow the frames that the front end computes from the valid samples alone
    (`_get_feat_extract_output_lengths`).
    """
    frames = valid_samples
    for kernel, stride in zip(kernels, strides, strict=True):
        frames = (frames - kernel) // stride + 1
    return jnp.arange(length)[None, :] >= frames[:, None]
