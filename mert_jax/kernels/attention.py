"""Scaled dot-product attention whose backward pass stores nothing of size T x T.

Shapes: B clips, T frames, H heads, d width of a head. Functions that say "one head" take matrices
[T, d] and [T, T] as well as all heads' [B, T, H, d] and [B, H, T, T].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mert_jax.kernels.dropout import Bits, apply_dropout, dropout_plain
from mert_jax.kernels.numerics import full_precision

Array = jax.Array
BLOCK = 512  # queries at a time in clips of more than twice as many frames
ATTENDED = "attended"  # names what is worth keeping where a layer is computed again


def attention_plain(
    query: Array, key: Array, value: Array, padding: Array | None, bits: Bits | None, rate: float
) -> Array:
    """Return dropout(softmax(query key^T / sqrt(d))) value, all [B, T, H, d].

    `padding` [B, T] is True at frames that are not attended to; with `bits` of [B, H, T, T] the
    weights go through dropout at `rate`. Scores and softmax are at least float32.
    """
    products = jnp.einsum("bthd,bshd->bhts", query, key).astype(full_precision(query.dtype))
    logits = products / query.shape[-1] ** 0.5
    if padding is not None:
        logits = jnp.where(padding[:, None, None], -jnp.inf, logits)
    weights = jax.nn.softmax(logits)
    if bits is not None:
        weights = dropout_plain(weights, bits, rate)
    return jnp.einsum("bhts,bshd->bthd", weights.astype(value.dtype), value)


def attention(query, key, value, padding, bits, rate):
    """Return `attention_plain`, in blocks of queries where the clips are long."""
    frames = query.shape[1]
    # an exported program's number of frames is a symbol, which cannot be compared
    long = isinstance(frames, int) and frames > 2 * BLOCK
    attend = attention_in_blocks if long else attention_recomputed
    return attend(query, key, value, padding, bits, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention_recomputed(query, key, value, padding, bits, rate):
    """Return `attention_plain`; the backward pass computes the weights again.

    It takes them from their logarithmic sums, and the sum over a row of weight times gradient from
    the result (arXiv 2205.14135, section B.4).
    """
    return _forward(query, key, value, padding, bits, rate)[0]


def attention_in_blocks(query, key, value, padding, bits, rate):
    """Return `attention_plain`, `BLOCK` queries at a time: memory grows with T, not T x T."""
    clips, frames, heads, width = query.shape
    number = -(-frames // BLOCK)

    def split(x: Array, axis: int) -> Array:
        ends = [(0, number * BLOCK - frames if i == axis else 0) for i in range(x.ndim)]
        shape = *x.shape[:axis], number, BLOCK, *x.shape[axis + 1 :]
        return jnp.moveaxis(jnp.pad(x, ends).reshape(shape), axis, 0)

    def block(x: tuple[Array, Array | None]) -> Array:
        query, rows = x
        block_bits = None if rows is None else (rows, columns)
        return attention_recomputed(query, key, value, padding, block_bits, rate)

    rows, columns = bits or (None, None)
    result = jax.lax.map(block, (split(query, 1), None if rows is None else split(rows, 2)))
    return jnp.moveaxis(result, 0, 1).reshape(clips, -1, heads, width)[:, :frames]


def _forward(query, key, value, padding, bits, rate):
    results = _each_head(weighted_mean, rate, padding, bits, query, key, value)
    result, log_total = (checkpoint_name(x, ATTENDED) for x in results)
    return result, (query, key, value, padding, bits, result, log_total)


def _backward(rate, residuals, gradient):
    query, key, value, padding, bits, result, log_total = residuals
    arrays = query, key, value, result, gradient, log_total
    return *_each_head(_gradients, rate, padding, bits, *arrays), None, None


attention_recomputed.defvjp(_forward, _backward)


def _each_head(function, rate, padding, bits, *arrays):
    """Call `function` on all heads at once; on a single CPU device, head by head."""
    function = functools.partial(function, rate=rate)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1  # several devices would each run the whole loop
    on_cpu = functools.partial(head_by_head, function) if alone else function
    return jax.lax.platform_dependent(padding, bits, *arrays, cpu=on_cpu, default=function)


def head_by_head(function, padding, bits, *arrays):
    """Return `function(padding, bits, *arrays)`, computed on one head of one clip at a time.

    CPU: XLA takes several times as long for a batch of matrix products, and twice as long where a
    loop instead of the program goes over the heads.
    """
    rows, columns = bits or (None, None)

    def clip(x):
        padding, rows, arrays = x

        def one(h):
            head_bits = None if rows is None else (rows[h], columns)
            return function(padding, head_bits, *(y[:, h] for y in arrays))

        heads = [one(h) for h in range(arrays[0].shape[1])]
        return jax.tree.map(lambda *y: jnp.stack(y, 1), *heads)

    return jax.lax.map(clip, (padding, rows, arrays))


def scores(query: Array, key: Array, padding: Array | None) -> Array:
    """Return query key^T / sqrt(d) in full precision: [B, H, T, T], or [T, T] of one head."""
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    logits = _row_products(query, key).astype(full_precision(query.dtype))
    if padding is not None:
        padding = jnp.expand_dims(padding, -2 if logits.ndim == 2 else (1, 2))
        logits = jnp.where(padding, -jnp.inf, logits)
    return logits


def weighted_mean(padding, bits, query, key, value, rate):
    """Return attention's result and the log of each row's sum of exponentials, [B, T, H, 1]."""
    logits = scores(query, key, padding)
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    # without dropout XLA would share exp, and store it
    on_tpu = totals if bits is None else functools.partial(totals_by_product, like=value)
    total = jax.lax.platform_dependent(logits, largest, tpu=on_tpu, default=totals)
    weights = apply_dropout(weights, bits, rate).astype(value.dtype)
    full = full_precision(value.dtype)
    result = _weighted_rows(weights, value, preferred_element_type=full)
    # divided after the sum: d numbers a row instead of T
    result = (result / _swap_heads(total)).astype(value.dtype)
    return result, _swap_heads(largest + jnp.log(total))


def totals(logits: Array, largest: Array) -> Array:
    """Sum exp(`logits` - `largest`) over each row: [B, H, T, 1], or [T, 1] of one head."""
    return jnp.exp(logits - largest).sum(-1, keepdims=True)


def totals_by_product(logits: Array, largest: Array, like: Array) -> Array:
    """Return `totals` of logits that a product in the dtype of `like` [B, T, H, d] has made.

    TPU: the matrix unit adds up a row in a tenth of the vector unit's time.
    """
    arrays = logits.astype(like.dtype), largest, jnp.ones_like(like)
    # so that exp is computed in front of each product and never stored
    logits, largest, ones = jax.lax.optimization_barrier(arrays)
    weights = jnp.exp(logits.astype(largest.dtype) - largest).astype(like.dtype)
    total = _weighted_rows(weights, ones, preferred_element_type=largest.dtype)
    return _swap_heads(total[..., :1])


def _gradients(padding, bits, query, key, value, result, gradient, log_total, rate):
    """Return the gradients by query, key and value."""
    full = full_precision(query.dtype)
    weights = jnp.exp(scores(query, key, padding) - _swap_heads(log_total))
    by_weight = _row_products(gradient, value).astype(full)
    by_value = _weighted_columns(apply_dropout(weights, bits, rate).astype(value.dtype), gradient)
    mean = _swap_heads((gradient.astype(full) * result.astype(full)).sum(-1, keepdims=True))
    by_score = (weights * (apply_dropout(by_weight, bits, rate) - mean)).astype(query.dtype)
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    by_query = _weighted_rows(by_score, key * scale)
    by_key = _weighted_columns(by_score, query * scale)
    return by_query, by_key, by_value


# Products of one head or all, without transposes, for which TPUs took more time and memory.


def _row_products(x: Array, y: Array) -> Array:  # x y^T
    return jnp.einsum("td,sd->ts" if x.ndim == 2 else "bthd,bshd->bhts", x, y)


def _weighted_rows(weights: Array, x: Array, preferred_element_type: Any = None) -> Array:
    subscripts = "ts,sd->td" if x.ndim == 2 else "bhts,bshd->bthd"
    return jnp.einsum(subscripts, weights, x, preferred_element_type=preferred_element_type)


def _weighted_columns(weights: Array, x: Array) -> Array:  # weights^T x
    return jnp.einsum("ts,td->sd" if x.ndim == 2 else "bhts,bthd->bshd", weights, x)


def _swap_heads(x: Array) -> Array:
    """Swap frames and heads of [B, T, H, 1] or [B, H, T, 1]; return one head's [T, 1] as it is."""
    return jnp.swapaxes(x, 1, 2) if x.ndim == 4 else x
