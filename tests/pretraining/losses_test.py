"""Losses against the official formulas, written out plainly in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.pretraining import losses


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def official(proj, codebooks, codes, temperature=0.1):
    """fairseq's `compute_pred` and `hubert_criterion` for one book: proj [M, d], codebooks [V, d],
    codes [M]; the sum of cross-entropies and the count of right predictions."""
    total, correct = 0.0, 0
    for row, code in zip(proj, codes, strict=True):
        candidates = np.concatenate([codebooks[code : code + 1], codebooks])
        norms = np.maximum(np.linalg.norm(candidates, axis=1) * np.linalg.norm(row), 1e-8)
        logits = candidates @ row / norms / temperature
        same = (candidates[1:] == candidates[0]).all(1)
        logits[1:][same] = -np.inf
        total += np.log(np.exp(logits).sum()) - logits[0]
        correct += int(logits.argmax() == 0 and logits.argmin() != 0)
    return total, correct


@pytest.mark.parametrize("bound", [math.inf, 10.0])
def test_code_loss_is_the_official_one(bound):
    clips, frames, books, classes, width = 2, 7, 3, 11, 4
    proj, codebooks = random(clips, frames, books, width), random(books, classes, width, seed=1)
    rng = np.random.default_rng(2)
    codes = rng.integers(0, classes, (clips, frames, books))
    mask = rng.random((clips, frames)) < 0.6
    logits = losses.cosine_logits(jnp.float32(proj), jnp.float32(codebooks), 0.1)
    ours = losses.code_loss(logits, jnp.asarray(codes), jnp.asarray(mask), bound)
    for book in range(books):
        total, correct = official(proj[mask][:, book], codebooks[book], codes[mask][:, book])
        np.testing.assert_allclose(ours.cross_entropy[book], total, rtol=1e-5)
        assert ours.correct[book] == correct
        counts = np.bincount(codes[mask][:, book], minlength=classes)
        np.testing.assert_array_equal(ours.targets[book], counts)
        assert ours.predictions[book].sum() == mask.sum()


def test_equal_logits_are_not_right():
    logits = jnp.zeros((1, 2, 1, 5)).at[0, 1, 0, 0].set(1.0)
    ours = losses.code_loss(logits, jnp.zeros((1, 2, 1), jnp.int32), jnp.ones((1, 2), bool))
    assert ours.correct.tolist() == [1]


def test_nothing_masked_costs_nothing():
    logits, codes = jnp.asarray(random(2, 3, 1, 5)), jnp.zeros((2, 3, 1), jnp.int32)
    ours = losses.code_loss(logits, codes, jnp.zeros((2, 3), bool))
    assert all(not np.any(x) for x in ours)


def test_what_is_not_masked_has_no_gradient():
    logits, mask = jnp.asarray(random(2, 3, 1, 5)), jnp.array([[True, False, False]] * 2)
    codes = jnp.zeros((2, 3, 1), jnp.int32)

    def loss(logits):
        return losses.code_loss(logits, codes, mask).cross_entropy.sum()

    gradient = np.abs(jax.grad(loss)(logits)).max((2, 3)) > 0
    np.testing.assert_array_equal(gradient, mask)


def test_a_zero_projection_has_finite_logits_and_gradient():
    codebooks = jnp.ones((1, 3, 4))

    def logits(proj):
        return losses.cosine_logits(proj, codebooks, 0.1).sum()

    assert logits(jnp.zeros((1, 4))) == 0
    assert np.isfinite(jax.grad(logits)(jnp.zeros((1, 4)))).all()


def test_feature_loss_is_the_mean_over_bins_summed_over_masked_frames():
    prediction, target = jnp.asarray(random(2, 5, 3)), jnp.asarray(random(2, 5, 3, seed=1))
    mask = np.random.default_rng(2).random((2, 5)) < 0.5
    ours = losses.feature_loss(prediction, target, jnp.asarray(mask))
    expected = np.square(np.asarray(prediction) - np.asarray(target))[mask].mean() * mask.sum()
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\).*\(1, 2, 2\)"):
        losses.code_loss(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 2), int), jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(1, 2, 4\)"):
        losses.feature_loss(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 4)), jnp.ones((1, 2), bool))
