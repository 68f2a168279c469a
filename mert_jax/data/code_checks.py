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

    Raises UserError for codes outside the codebook, and if hardly more than one code is used.
    """
    used = perplexity(counts)
    rounded = " ".join(f"{x:.0f}" for x in used)
    for k, (row, effective) in enumerate(zip(counts, used, strict=True)):
        if outside := frames - int(row.sum()):
            problem = f"{outside} of {frames} codes of codebook {k} lie outside its {len(row)}"
            raise UserError(f"{name}: {problem} classes; they come from another codec")
        if effective < MIN_PERPLEXITY:
            share = row.max() / max(frames, 1)
            raise UserError(
                f"{name}: codebook {k} of {len(used)} is degenerate: {share:.1%} of {frames} "
                f"frames are code {row.argmax()} (perplexity {rounded}); check the audio, or leave "
                "the codebook out"
            )
    return f"{name}: {len(used)} codebooks of {counts.shape[1]}, perplexity {rounded}"
