"""Checks that codes are worth learning, by how often each is used."""

import numpy as np

from mert_jax.errors import UserError

MIN_PERPLEXITY = 1.5


def perplexity(counts: np.ndarray) -> np.ndarray:
    """Return exp(entropy) [K] of each row of `counts` [K, V]: the codes in effective use."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), -1))


def check_codes(name: str, counts: np.ndarray, frames: int) -> str:
    """Return a line on how often codes are used, from their `counts` [K, V] in `frames` frames.

    Raises UserError for a degenerate codebook, of which hardly more than one code is used, and for
    codes outside the codebook.
    """
    used = perplexity(counts)
    rounded = " ".join(f"{x:.0f}" for x in used)
    for k, inside in enumerate(counts.sum(1)):
        if inside != frames:
            raise UserError(
                f"{name}: {frames - int(inside)} of {frames} codes of codebook {k} lie outside its "
                f"{counts.shape[1]} classes; they come from another codec"
            )
    if degenerate := [k for k, x in enumerate(used) if x < MIN_PERPLEXITY]:
        row = counts[degenerate[0]]
        raise UserError(
            f"{name}: codebook {', '.join(map(str, degenerate))} of {len(used)} is degenerate: "
            f"{row.max() / max(frames, 1):.1%} of {frames} frames are code {row.argmax()} "
            f"(perplexity {rounded}); check the audio, or leave the codebooks out"
        )
    return f"{name}: {len(used)} codebooks of {counts.shape[1]}, perplexity {rounded}"
