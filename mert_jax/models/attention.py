"""Self-attention, with a backward pass that keeps nothing of size T x T.

Shapes: B clips, T frames, D width, H heads, d width of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mert_jax.models.layers import dropped, encoder_init, full_precision, logical, random_words

Array = jax.Array
BLOCK = 512  # queries at a time in clips of more than twice as many frames
ATTENDED = "attended"  # names what is worth keeping where a layer is computed again


def scores(query: Array, key: Array, padding: Array | None, relax: float = 0.0) -> Array:
    """Scaled dot products, in full precision: [B, H, T, T], or [T, T] of one head.

    `query` and `key` are [B, T, H, d], `padding` [B, T] is True at frames nobody may attend to; of
    one head [T, d] and [T]. `relax` > 0 divides the query by it, subtracts the row's maximum there
    and scales back, so that half-precision scores cannot overflow; their softmax is the same.
    (MERT's `attention_relax` was meant to do this and never ran: its attention returns through
    torch's fused path before.)
    """
    scale = query.shape[-1] ** -0.5
    query = query * jnp.asarray(scale / (relax or 1.0), query.dtype)
    found = _product("td,sd->ts", query, key).astype(full_precision(query.dtype))
    if padding is not None:
        padding = jnp.expand_dims(padding, -2 if found.ndim == 2 else (1, 2))
        found = jnp.where(padding, -jnp.inf, found)
    if relax:
        found = (found - jax.lax.stop_gradient(found.max(-1, keepdims=True))) * relax
    return found


def _product(subscripts, *arrays, **options):
    """`einsum` of one head's matrices [T, d] and [T, T], or of all heads' [B, T, H, d] and
    [B, H, T, T] by the same subscripts."""
    if arrays[0].ndim == 4:  # no transposes: TPUs took more time and memory with those
        for one, all_heads in (("td", "bthd"), ("sd", "bshd"), ("ts", "bhts")):
            subscripts = subscripts.replace(one, all_heads)
    return jnp.einsum(subscripts, *arrays, **options)


def _as_frames(x):
    """What is one number a row of scores, [B, H, T, 1], as [B, T, H, 1], and back; one head's as it
    is."""
    return jnp.swapaxes(x, 1, 2) if x.ndim == 4 else x


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
    query: Array,
    key: Array,
    value: Array,
    padding: Array | None,
    words: tuple[Array, Array] | None,
    rate: float,
    relax: float,
) -> Array:
    """`attend`, `BLOCK` queries at a time: memory grows with T, not with T x T."""
    clips, frames, heads, width = query.shape
    number = -(-frames // BLOCK)

    def split(x: Array, axis: int) -> Array:
        ends = [(0, 0)] * x.ndim
        ends[axis] = (0, number * BLOCK - frames)
        shape = *x.shape[:axis], number, BLOCK, *x.shape[axis + 1 :]
        return jnp.moveaxis(jnp.pad(x, ends).reshape(shape), axis, 0)

    def block(x: tuple[Array, Array | None]) -> Array:
        query, rows = x
        own = None if rows is None else (rows, columns)
        return attend(query, key, value, padding, own, rate, relax)

    rows, columns = words or (None, None)
    result = jax.lax.map(block, (split(query, 1), None if rows is None else split(rows, 2)))
    return jnp.moveaxis(result, 0, 1).reshape(clips, -1, heads, width)[:, :frames]


def _forward(query, key, value, padding, words, rate, relax):
    weighted = functools.partial(_weighted, rate=rate, relax=relax)
    result, log_total = _each_head(weighted, padding, words, query, key, value)
    result = checkpoint_name(result, ATTENDED)
    log_total = checkpoint_name(log_total, ATTENDED)
    return result, (query, key, value, padding, words, result, log_total)


def _each_head(function, padding, words, *arrays):
    """`function` of padding, words and arrays [B, T, H, ...], which takes one head's [T, ...] too:
    at once, or on a single CPU head by head."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1  # several devices would each run the whole loop
    on_cpu = functools.partial(_in_turn, function) if alone else function
    return jax.lax.platform_dependent(padding, words, *arrays, cpu=on_cpu, default=function)


def _in_turn(function, padding, words, *arrays):
    """On CPUs XLA takes several times as long for a batch of products of matrices as for one after
    another, and twice as long where a loop and not the program has them in turn."""
    rows, columns = words or (None, None)

    def clip(x):
        padding, rows, arrays = x

        def one(h):
            own = None if rows is None else (rows[h], columns)
            return function(padding, own, *(y[:, h] for y in arrays))

        heads = [one(h) for h in range(arrays[0].shape[1])]
        return jax.tree.map(lambda *y: jnp.stack(y, 1), *heads)

    return jax.lax.map(clip, (padding, rows, arrays))


def _weighted(padding, words, query, key, value, rate, relax):
    """The result of `attend`, and the logarithm of each row's sum of exponentials [B, T, H, 1]."""
    logits = scores(query, key, padding, relax)
    largest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    on_tpu = totals
    if words is not None and not relax:  # without dropout XLA would share exp, and store it
        on_tpu = functools.partial(totals_by_product, like=value)
    total = jax.lax.platform_dependent(logits, largest, tpu=on_tpu, default=totals)
    weights = _dropped(weights, words, rate).astype(value.dtype)
    full = full_precision(value.dtype)
    result = _product("ts,sd->td", weights, value, preferred_element_type=full)
    # divided after the sum: d numbers a row instead of T
    result = (result / _as_frames(total)).astype(value.dtype)
    return result, _as_frames(largest + jnp.log(total))


def totals(logits: Array, largest: Array) -> Array:
    """The sum over a row of exp(`logits` - `largest`): [B, H, T, 1], or [T, 1]."""
    return jnp.exp(logits - largest).sum(-1, keepdims=True)


def totals_by_product(logits: Array, largest: Array, like: Array) -> Array:
    """`totals` of logits that a product in the dtype of `like` [B, T, H, d] has made, for TPUs: the
    matrix unit adds up a row in a tenth of the vector unit's time."""
    # behind a barrier, so that exp is computed in front of each product and never stored
    logits, largest, ones = jax.lax.optimization_barrier(
        (logits.astype(like.dtype), largest, jnp.ones_like(like))
    )
    weights = jnp.exp(logits.astype(largest.dtype) - largest).astype(like.dtype)
    total = _product("ts,sd->td", weights, ones, preferred_element_type=largest.dtype)
    return _as_frames(total[..., :1])


def _backward(rate, relax, kept, gradient):
    query, key, value, padding, words, result, log_total = kept
    gradients = functools.partial(_gradients, rate=rate, relax=relax)
    arrays = (query, key, value, result, gradient, log_total)
    return *_each_head(gradients, padding, words, *arrays), None, None


def _gradients(padding, words, query, key, value, result, gradient, log_total, rate, relax):
    """By query, key and value."""
    full = full_precision(query.dtype)
    weights = jnp.exp(scores(query, key, padding, relax) - _as_frames(log_total))
    by_weight = _product("td,sd->ts", gradient, value).astype(full)
    dropped = _dropped(weights, words, rate).astype(value.dtype)
    by_value = _product("ts,td->sd", dropped, gradient)
    mean = _as_frames((gradient.astype(full) * result.astype(full)).sum(-1, keepdims=True))
    by_score = (weights * (_dropped(by_weight, words, rate) - mean)).astype(query.dtype)
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    by_query = _product("ts,sd->td", by_score, key * scale)
    by_key = _product("ts,td->sd", by_score, query * scale)
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
        long = isinstance(frames, int) and frames > 2 * BLOCK
        attended = attend_in_blocks if long else attend
        y = attended(query, key, value, padding, words, self.dropout, self.relax)
        kernel_init = logical(encoder_init, "heads", "embed")
        return nn.Dense(width, dtype=self.dtype, kernel_init=kernel_init, name="out_proj")(
            y.reshape(x.shape)
        )
