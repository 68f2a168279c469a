"""Masks, the waves they make and their distortion."""

import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.probing import separation
from tests.labelled_music import with_ffmpeg

RATE, HOP = 24_000, 320
BANDS = separation.filters(RATE)


def sources(seconds: float = 2.0) -> np.ndarray:
    """Two sines far apart, f32[2, N]."""
    time = np.arange(round(seconds * RATE)) / RATE
    return np.stack([0.3 * np.sin(2 * np.pi * f * time) for f in (200, 4000)]).astype(np.float32)


def test_bins_are_means_of_bands():
    assert BANDS.shape == (1025, separation.BANDS)
    np.testing.assert_allclose(BANDS.sum(1), 1, atol=1e-5)


def test_true_shares_separate_what_lies_apart():
    truth = sources()
    mixture = truth.sum(0)
    shares = separation.shares(np.concatenate([mixture[None], truth]), BANDS, HOP)
    assert shares.shape == (len(mixture) // HOP + 1, 3, separation.BANDS)
    np.testing.assert_allclose(shares[:, 1:].sum(1), 1, atol=1e-4)
    found = separation.separate(mixture, shares[:, 1:], BANDS, HOP)
    assert found.shape == truth.shape
    assert separation.sdr(truth, found).min() > 15
    np.testing.assert_allclose(found.sum(0), mixture, atol=1e-3)  # the masks add up to one


def test_sdr_is_decibels_of_the_whole_song():
    truth = sources()
    assert separation.sdr(truth, 0.9 * truth) == pytest.approx([20, 20], abs=0.01)
    silent = np.stack([truth[0], np.zeros_like(truth[0])])
    found = separation.sdr(silent, silent + 0.1 * truth[0])
    assert found[0] == pytest.approx(20, abs=0.01)
    assert np.isnan(found[1])


@with_ffmpeg
def test_musevals_sdr_leaves_out_a_silent_source():
    rng = np.random.default_rng(0)
    truth = 0.1 * rng.standard_normal((2, 3 * RATE)).astype(np.float32)
    noisy = truth + 0.01 * rng.standard_normal(truth.shape).astype(np.float32)
    assert separation.museval_sdr(truth, noisy, RATE) == pytest.approx([20, 20], abs=0.5)
    truth[1] = 0
    found = separation.museval_sdr(truth, noisy, RATE)
    assert found[0] == pytest.approx(20, abs=0.5)
    assert np.isnan(found[1])


def test_the_loss_weighs_bands_by_their_energy():
    masks = np.zeros((1, 2, 3), np.float32)
    masks[:, 0] = 1
    energy = np.array([[1.0, 0.0, 4.0]], np.float32)
    target = {"masks": masks, "energy": energy}
    logits = jnp.zeros((1, 6))  # an equal share for both: an error of 0.25 each
    assert separation.loss(logits, target).tolist() == [2.5]
    right = jnp.asarray(np.where(masks > 0, 50.0, -50.0).reshape(1, 6))
    assert separation.loss(right, target).tolist() == [0]
