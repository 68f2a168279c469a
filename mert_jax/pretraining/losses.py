"""The parts of the objective, as sums over masked frames in at least float32.

Shapes: B clips, T frames, K codebooks, V classes, d projection width, F feature bins.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class CodeLoss(NamedTuple):
    """Sums over masked frames for each codebook."""

    cross_entropy: Array  # in nats, [K]
    correct: Array  # number of frames predicted correctly, [K]
    targets: Array  # how often each class was the target, [K, V]
    predictions: Array  # and the prediction, [K, V]


def _unit(x: Array) -> Array:
    # x / max(|x|, 1e-8) as in torch.cosine_similarity; the square is clamped, which gives 0 a
    # finite gradient
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-16))


def cosine_logits(proj: Array, codebooks: Array, temperature: float) -> Array:
    """Return cos(`proj` [..., K, d], `codebooks` [K, V, d]) / `temperature`: [..., K, V].

    Source: HuBERT, arXiv 2106.07447, eq. 3.
    """
    pair, exact = (_unit(proj), _unit(codebooks)), jax.lax.Precision.HIGHEST
    return jnp.einsum("...kd,kvd->...kv", *pair, precision=exact) / temperature


def code_loss(logits: Array, codes: Array, mask: Array, bound: float = math.inf) -> CodeLoss:
    """Compare `logits` [B, T, K, V] with `codes` [B, T, K] at the frames of `mask` [B, T].

    `bound` is the largest possible |logit|; a small one saves a pass over the logits. A prediction
    is correct when the target's logit is the largest and the logits are not all equal (fairseq,
    `hubert_criterion`).
    """
    if logits.shape[:-1] != codes.shape:
        raise ValueError(f"logits {logits.shape} do not match codes {codes.shape}")
    target = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
    largest = jax.lax.stop_gradient(logits.max(-1))
    # logsumexp(logits); if no exponential can underflow, `bound` serves as well as the row's
    # largest logit, and the sum does not wait for it
    shift = jnp.full_like(largest, bound) if bound <= 40 else largest
    log_sum = shift + jnp.log(jnp.exp(logits - shift[..., None]).sum(-1))
    counted = mask[..., None]
    cross_entropy = jnp.where(counted, log_sum - target, 0)
    correct = (target >= largest) & (target > logits.min(-1)) & counted

    def histogram(classes: Array) -> Array:
        def count(column: Array) -> Array:
            return jnp.zeros(logits.shape[-1], jnp.int32).at[column].add(mask, mode="drop")

        return jax.vmap(count, in_axes=-1)(classes)

    sums = cross_entropy.sum((0, 1)), correct.sum((0, 1))
    return CodeLoss(*sums, histogram(codes), histogram(logits.argmax(-1)))


def feature_loss(prediction: Array, target: Array, mask: Array) -> Array:
    """Return the squared error [B, T, F], averaged over bins and summed where `mask` is True."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} does not match target {target.shape}")
    error = jnp.square(prediction - target).mean(-1)
    return jnp.where(mask, error, 0).sum()
