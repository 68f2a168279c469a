"""Attention against its plain form: values, gradients, dropout, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.kernels import attention
from mert_jax.kernels.dropout import hash_bits
from mert_jax.models.layers import Attention

B, T, H, D = 2, 11, 3, 8
RATE = 0.3


def inputs(dtype=jnp.float32):
    query, key, value, gradient = jax.random.normal(jax.random.key(0), (4, B, T, H, D), dtype)
    return (query, key, value), gradient


def value_and_gradients(function, dtype, *options):
    arrays, gradient = inputs(dtype)

    @jax.jit
    def both(arrays, gradient):
        value, pull = jax.vjp(lambda *arrays: function(*arrays, *options), *arrays)
        return value, *pull(gradient)

    return [np.asarray(x, np.float32) for x in both(arrays, gradient)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_its_plain_form(padded, dropout, dtype):
    padding = jnp.arange(T)[None] >= jnp.array([[T], [7]]) if padded else None
    bits = hash_bits(jax.random.key(1), (B, H, T, T)) if dropout else None
    options = padding, bits, RATE
    actual = value_and_gradients(attention.attention_recomputed, dtype, *options)
    exact = value_and_gradients(attention.attention_plain, dtype, *options)
    tolerance = 2e-6 if dtype == jnp.float32 else 0.02
    for a, b in zip(actual, exact, strict=True):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


def test_the_backward_pass_keeps_nothing_of_frames_by_frames():
    arrays, _ = inputs()
    bits = hash_bits(jax.random.key(1), (B, H, T, T))

    def keeping(*arrays):
        return jax.vjp(
            lambda *arrays: attention.attention_recomputed(*arrays, None, bits, RATE), *arrays
        )[1]

    stored = jax.tree.leaves(jax.eval_shape(keeping, *arrays))
    assert stored
    assert not [x.shape for x in stored if x.shape.count(T) > 1]


def test_totals_by_a_product_are_those_by_a_sum():
    keys = jax.random.split(jax.random.key(3), 2)
    query, key = (jax.random.normal(k, (B, T, H, 8), jnp.bfloat16) for k in keys)
    logits = attention.scores(query, key, None)
    largest = logits.max(-1, keepdims=True)
    by_sum = attention.totals(logits, largest)
    by_product = attention.totals_by_product(logits, largest, query)
    assert by_product.shape == by_sum.shape
    assert by_product.dtype == jnp.float32
    # each weight is rounded to 8 bits
    np.testing.assert_allclose(by_product, by_sum, rtol=2**-9)


@pytest.mark.parametrize("block", [1, 4, T, 20])
@pytest.mark.parametrize("dropout", [False, True])
def test_blocks_of_queries_change_nothing(dropout, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    padding = jnp.arange(T)[None] >= jnp.array([[T], [7]])
    bits = hash_bits(jax.random.key(1), (B, H, T, T)) if dropout else None
    options = jnp.float32, padding, bits, RATE
    together = value_and_gradients(attention.attention_recomputed, *options)
    blocks = value_and_gradients(attention.attention_in_blocks, *options)
    for a, b in zip(blocks, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_long_clips_are_attended_in_blocks(dropout, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 5)
    layer = Attention(H, RATE if dropout else 0.0, jnp.float32)
    x = jax.random.normal(jax.random.key(4), (B, T, H * D))

    def apply(x):
        return layer.init_with_output(jax.random.key(5), x, None, False)[0]

    program = jax.make_jaxpr(apply)(x)
    assert f"{T},{T}" not in str(program)


@pytest.mark.parametrize("dropout", [False, True])
def test_single_heads_change_nothing(dropout):
    arrays, _ = inputs()
    padding = jnp.arange(T)[None] >= jnp.array([[T], [7]])
    bits = hash_bits(jax.random.key(1), (B, H, T, T)) if dropout else None

    def weighted(*arrays):
        return attention.weighted_mean(*arrays, rate=RATE)

    together = weighted(padding, bits, *arrays)
    in_turn = attention.head_by_head(weighted, padding, bits, *arrays)
    for a, b in zip(together, in_turn, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
