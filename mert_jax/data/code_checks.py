"""Whether codes are worth learning, before weeks are spent on them."""

import numpy as np

from mert_jax.errors import UserError

LEAST = 1.5  # codes in effective use


def perplexity(counts: np.ndarray) -> np.ndarray:
    """exp(entropy) of each row of `counts` [K, V]: how many codes are in effective use, [K]."""
    p = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), -1))


def check_codes(name: str, counts: np.ndarray, frames: int) -> str:
    """One line on how often codes come, `counts` [K, V] of `frames` frames.

    Raises UserError with the numbers when a codebook is degenerate (hardly more than one code is in
    use) or codes lie outside it.
    """
    used = perplexity(counts)
    words = " ".join(f"{x:.0f}" for x in used)
    if outside := [(k, frames - int(n)) for k, n in enumerate(counts.sum(1)) if n != frames]:
        k, lost = outside[0]
        raise UserError(
            f"{name}: {lost} of {frames} codes of codebook {k} lie outside its {counts.shape[1]} "
            "classes; these are another codec's labels"
        )
    if dead := [k for k, x in enumerate(used) if x < LEAST]:
        share = counts[dead[0]].max() / max(frames, 1)
        raise UserError(
            f"{name}: codebook {', '.join(map(str, dead))} of {len(used)} is degenerate: "
            f"{share:.1%} of {frames} frames are code {counts[dead[0]].argmax()} (perplexity "
            f"{words}); check the audio, or leave the books out"
        )
    return f"{name}: {len(used)} codebooks of {counts.shape[1]}, perplexity {words}"
