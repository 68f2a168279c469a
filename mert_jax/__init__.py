"""mert_jax: pretraining of MERT music models in JAX."""

from typing import Any


def load(path: str) -> Any:
    """Load the model of a checkpoint: a workdir, a Hugging Face directory or a fairseq file.

    `load(path)(wave, sample_rate=24000)` returns hidden states f32 [L + 1, T, D] of a wave f32 [N],
    or [L + 1, B, T, D] of [B, N]; see `embedder.Model`. Raises UserError if `path` is not a
    checkpoint.
    """
    from mert_jax.extraction import embedder  # loads jax, which decoding processes do not need

    return embedder.load(path)
