"""The parts of the objective: sums over masked frames, with their counts kept apart.

Shapes: B clips, T frames, K codebooks, V classes, d projection width, F feature bins. Everything is
computed in at least float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class CodeLoss(NamedTuple):
    """Sums over masked frames for each codebook.

    cross_entropy: [K], nats; correct: [K], frames predicted right; targets, predictions: [K, V],
    how often each class was the target and the prediction.
    """

    cross_entropy: Array
    correct: Array
    targets: Array
    predictions: Array


def _unit(x: Array) -> Array:
    # clamped as in torch.cosine_similarity; the square is clamped so that 0 has a gradient
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-16))


def cosine_logits(proj: Array, codebooks: Array, temperature: float) -> Array:
    """Cosine similarity of `proj` [..., K, d] to each row of `codebooks` [K, V, d], over
    `temperature`: [..., K, V] (HuBERT, arXiv 2106.07447, eq. 3)."""
    logits = jnp.einsum(
        "...kd,kvd->...kv", _unit(proj), _unit(codebooks), precision=jax.lax.Precision.HIGHEST
    )
    return logits / temperature


def code_loss(logits: Array, codes: Array, mask: Array, bound: float = math.inf) -> CodeLoss:
    """Masked cross-entropy of `logits` [B, T, K, V] against `codes` int [B, T, K], summed where
    `mask` [B, T] is True. No logit is further from 0 than `bound`; a small one saves a pass.

    A prediction is right when the target's logit is the largest and the logits are not all equal
    (the official count, fairseq's `hubert_criterion`).
    """
    if logits.shape[:-1] != codes.shape:
        raise ValueError(f"logits {logits.shape} do not go with codes {codes.shape}")
    num_classes = logits.shape[-1]
    target = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
    largest = jax.lax.stop_gradient(logits.max(-1))
    # where no exponential can underflow, the sum need not wait for the row's largest
    above = jnp.full_like(largest, bound) if bound <= 40 else largest
    log_sum = above + jnp.log(jnp.exp(logits - above[..., None]).sum(-1))
    counted = mask[..., None]
    cross_entropy = jnp.where(counted, log_sum - target, 0)
    correct = (target >= largest) & (target > logits.min(-1)) & counted

    def histogram(classes: Array) -> Array:
        count = lambda column: jnp.zeros(num_classes, jnp.int32).at[column].add(mask, mode="drop")
        return jax.vmap(count, in_axes=-1)(classes)

    return CodeLoss(
        cross_entropy.sum((0, 1)),
        correct.sum((0, 1)),
        histogram(codes),
        histogram(logits.argmax(-1)),
    )


def feature_loss(prediction: Array, target: Array, mask: Array) -> Array:
    """Squared error of `prediction` against `target`, both [B, T, F], mean over bins and summed
    where `mask` [B, T] is True."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} does not go with target {target.shape}")
    error = jnp.square(prediction - target).mean(-1)
    return jnp.where(mask, error, 0).sum()
