"""Self-attention, with a backward pass that keeps nothing of size T x T.

Shapes: B clips, T frames, D width, H heads, d width of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mert_jax.layers import dropped, encoder_init, full_precision, logical, random_words

Array = jax.Array
BLOCK = 512  # queries at a time in clips of more than twice as many frames
ATTENDED = "attended"  # names what is worth keeping where a layer is computed again


def scores(query: Array, key: Array, padding: Array | None, relax: float = 0.0) -> Array:
    """Scaled dot products, in full precision: [B, H, T, T].

    `query` and `key` are [B, T, H, d], `padding` [B, T] is True at frames nobody may attend to.
    `relax` > 0 divides the query by it, subtracts the row's maximum there and scales back, so that
    half-precision scores cannot overflow; their softmax is the same. (MERT's `attention_relax` was
    meant to do this and never ran: its attention returns through torch's fused path before.)
    """
    scale = query.shape[-1] ** -0.5
    query = query * jnp.asarray(scale / (relax or 1.0), query.dtype)
    found = jnp.einsum("bthd,bshd->bhts", query, key).astype(full_precision(query.dtype))
    if padding is not None:
        found = jnp.where(padding[:, None, None, :], -jnp.inf, found)
    if relax:
        found = (found - jax.lax.stop_gradient(found.max(-1, keepdims=True))) * relax
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    query: Array,
    key: Array,
    value: Array,
    padding: Array | None,
    words: tuple[Array, Array] | None,
    rate: float,
    relax: float,
) -> Array:
    """The mean of `value` weighted by the softmax of `scores`, all [B, T, H, d]; with `words`, the
    weights go through dropout at `rate`.

    The backward pass computes the weights again from their logarithmic sums, and takes the sum over
    a row of weight times gradient from the result (arXiv 2205.14135, section B.4).
    """
    return _forward(query, key, value, padding, words, rate, relax)[0]


def attend_in_blocks(
    query: Array, key: Array, value: Array, padding: Array | None, relax: float
) -> Array:
    """`attend` without dropout, `BLOCK` queries at a time: memory grows with T, not with T x T."""
    clips, frames, heads, width = query.shape
    number = -(-frames // BLOCK)
    blocks = jnp.pad(query, ((0, 0), (0, number * BLOCK - frames), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(clips, number, BLOCK, heads, width), 1, 0)
    result = jax.lax.map(lambda q: attend(q, key, value, padding, None, 0.0, relax), blocks)
    return jnp.moveaxis(result, 0, 1).reshape(clips, -1, heads, width)[:, :frames]


def _forward(query, key, value, padding, words, rate, relax):
    weighted = functools.partial(_weighted, rate=rate, relax=relax)
    result, log_total = jax.lax.platform_dependent(
        *(query, key, value, padding, words),
        cpu=_on_cpu(weighted),
        default=weighted,
    )
    result = checkpoint_name(result, ATTENDED)
    log_total = checkpoint_name(log_total, ATTENDED)
    return result, (query, key, value, padding, words, result, log_total)


def _weighted(query, key, value, padding, words, rate, relax):
    """The result of `attend`, and the logarithm of each row's sum of exponentials [B, T, H, 1]."""
    logits = scores(query, key, padding, relax)
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    on_tpu = totals
    if words is not None and not relax:  # without dropout XLA would share exp, and store it
        on_tpu = functools.partial(totals_by_product, like=value)
    total = jax.lax.platform_dependent(logits, largest, tpu=on_tpu, default=totals)
    weights = _dropped(weights, words, rate).astype(value.dtype)
    result = jnp.einsum(
        "bhts,bshd->bthd", weights, value, preferred_element_type=full_precision(value.dtype)
    )
    # divided after the sum: d numbers a row instead of T
    result = (result / jnp.swapaxes(total, 1, 2)).astype(value.dtype)
    return result, jnp.swapaxes(largest + jnp.log(total), 1, 2)


def _on_cpu(function):
    """Head by head on one device; a loop over what several devices share would be run by all."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    return functools.partial(_head_by_head, function) if alone else function


def _head_by_head(function, query, key, value, padding, words, *more):
    """`function` of one head of one clip at a time; `more`, like query and results, are
    [B, T, H, ...]. On CPUs XLA takes several times as long for a batch of products of matrices as
    for one after another, and twice as long where a loop and not the program has them in turn."""
    rows, columns = words or (None, None)

    def clip(x):
        arrays, padding, rows = jax.tree.map(lambda y: y[None], x)

        def one(h):
            own = None if rows is None else (rows[:, h : h + 1], columns)
            head = [y[:, :, h : h + 1] for y in arrays]
            return function(*head[:3], padding, own, *head[3:])

        heads = [one(h) for h in range(query.shape[2])]
        return jax.tree.map(lambda *y: jnp.concatenate(y, 2)[0], *heads)

    return jax.lax.map(clip, ([query, key, value, *more], padding, rows))


def totals(logits: Array, largest: Array) -> Array:
    """The sum over a row of exp(`logits` - `largest`): [B, H, T, 1]."""
    return jnp.exp(logits - largest).sum(-1, keepdims=True)


def totals_by_product(logits: Array, largest: Array, like: Array) -> Array:
    """`totals` of logits that a product in the dtype of `like` [B, T, H, d] has made, for TPUs: the
    matrix unit adds up a row in a tenth of the vector unit's time."""
    # behind a barrier, so that exp is computed in front of each product and never stored
    logits, largest, ones = jax.lax.optimization_barrier(
        (logits.astype(like.dtype), largest, jnp.ones_like(like))
    )
    weights = jnp.exp(logits.astype(largest.dtype) - largest).astype(like.dtype)
    total = jnp.einsum("bhts,bshd->bthd", weights, ones, preferred_element_type=largest.dtype)
    return jnp.swapaxes(total[..., :1], 1, 2)


def _backward(rate, relax, kept, gradient):
    query, key, value, padding, words, result, log_total = kept
    gradients = functools.partial(_gradients, rate=rate, relax=relax)
    found = jax.lax.platform_dependent(
        *(query, key, value, padding, words, result, gradient, log_total),
        cpu=_on_cpu(gradients),
        default=gradients,
    )
    return *found, None, None


def _gradients(query, key, value, padding, words, result, gradient, log_total, rate, relax):
    """By query, key and value."""
    full = full_precision(query.dtype)
    log_total = jnp.swapaxes(log_total, 1, 2)
    weights = jnp.exp(scores(query, key, padding, relax) - log_total)
    by_weight = jnp.einsum("bthd,bshd->bhts", gradient, value).astype(full)
    by_value = jnp.einsum(
        "bhts,bthd->bshd", _dropped(weights, words, rate).astype(value.dtype), gradient
    )
    mean = (gradient.astype(full) * result.astype(full)).sum(-1).swapaxes(1, 2)[..., None]
    by_score = (weights * (_dropped(by_weight, words, rate) - mean)).astype(query.dtype)
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    by_query = jnp.einsum("bhts,bshd->bthd", by_score, key * scale)
    by_key = jnp.einsum("bhts,bthd->bshd", by_score, query * scale)
    return by_query, by_key, by_value


def _dropped(x: Array, words: tuple[Array, Array] | None, rate: float) -> Array:
    return x if words is None else dropped(x, words, rate)


attend.defvjp(_forward, _backward)


class Attention(nn.Module):
    """Self-attention with H heads: [B, T, D] -> [B, T, D]."""

    num_heads: int
    dropout: float
    relax: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, padding: Array | None, deterministic: bool) -> Array:
        clips, frames, width = x.shape

        def project(name: str) -> Array:
            kernel_init = logical(encoder_init, "embed", "heads")
            y = nn.Dense(width, dtype=self.dtype, kernel_init=kernel_init, name=name)(x)
            return y.reshape(clips, frames, self.num_heads, width // self.num_heads)

        query, key, value = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
        words = None
        if self.dropout and not deterministic:
            shape = (clips, self.num_heads, frames, frames)
            words = random_words(self.make_rng("dropout"), shape)
        # an exported program's number of frames is a symbol, which cannot be compared
        if words is None and isinstance(frames, int) and frames > 2 * BLOCK:
            y = attend_in_blocks(query, key, value, padding, self.relax)
        else:
            y = attend(query, key, value, padding, words, self.dropout, self.relax)
        kernel_init = logical(encoder_init, "heads", "embed")
        return nn.Dense(width, dtype=self.dtype, kernel_init=kernel_init, name="out_proj")(
            y.reshape(x.shape)
        )
