"""mert_jax: pretraining of MERT music models in JAX."""

from typing import Any


def load(path: str) -> Any:
    """The model of a checkpoint (a workdir of ours, a Hugging Face directory or a fairseq file):
    `load(path)(wave, sample_rate=24000)` -> hidden states f32 [L + 1, T, D] of a wave f32 [N], or
    [L + 1, B, T, D] of [B, N]; see `embedding.Model`. UserError for what is no checkpoint."""
    from mert_jax.extraction import embedder  # jax, which decoding has no need of

    return embedder.load(path)
