"""Hidden states of recordings: alone, among others, in chunks, in windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mert_jax
from mert_jax.checkpoints import huggingface, in_memory, workdir
from mert_jax.errors import UserError
from mert_jax.extraction import embedder
from mert_jax.models.mert_v1 import hidden_states
from tests.extraction.small_student import RATE, checkpoint, music

CONTEXT = 8 / RATE  # the reach of the positional convolution


SLOW_95M = pytest.param("95m", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[SLOW_95M, "330m"])
def small(request):
    return embedder.Model(checkpoint(request.param))


def one_pass(model, wave):
    """Return the hidden states from one pass over the whole recording."""
    if model.about.do_normalize:
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    states = jitted_hidden_states(model.student, model.params, jnp.asarray(wave)[None])
    return np.asarray(states[:, 0])


jitted_hidden_states = functools.partial(jax.jit, static_argnums=0)(hidden_states)
LENGTHS = (40, 41, 2_000, 700, 2_000, 9_000, 1_999)


@pytest.mark.parametrize(("flavour", "normalised"), [("95m", True), ("330m", False)])
def test_batch_and_padding_change_nothing(flavour, normalised):
    model = embedder.Model(checkpoint(flavour, normalised))
    waves = music(*LENGTHS)
    together = list(model.embed(waves, batch=3.0))
    for wave, states in zip(waves, together, strict=True):
        expected = one_pass(model, wave)
        assert states.shape == expected.shape
        np.testing.assert_allclose(states, expected, atol=1e-5)
        np.testing.assert_allclose(model(wave), states, atol=1e-5)


def test_a_long_recording_in_one_piece(small):
    (wave,) = music(26_000)  # 1,299 frames: the front end runs in pieces, attention in blocks
    np.testing.assert_allclose(small(wave), one_pass(small, wave), atol=1e-5)


def test_chunks_hear_their_context(small):
    (wave,) = music(30_000)
    at_once, frames = small(wave), 1_499
    chunked = next(small.embed([wave], chunk=400 / RATE, context=CONTEXT))
    # the encoder's input depends on no more context if the norm is that of the whole recording
    np.testing.assert_allclose(chunked[0], at_once[0], atol=1e-5)
    assert chunked.shape == at_once.shape == (small.num_layers + 1, frames, at_once.shape[-1])
    assert np.abs(chunked[-1] - at_once[-1]).max() > 1e-3  # attention hears the chunk alone
    narrow = next(small.embed([wave], chunk=400 / RATE, context=0.0))
    assert np.abs(narrow[0] - at_once[0]).max() > 1e-3


def test_windows_are_separate_recordings(small):
    (wave,) = music(5_010)
    states = next(small.embed([wave], window=2_000 / 24_000))
    parts = [small(part) for part in (wave[:2_000], wave[2_000:4_000], wave[4_000:])]
    np.testing.assert_allclose(states, np.concatenate(parts, 1), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"chunk": 400 / RATE, "context": CONTEXT}])
def test_means_and_single_layers(small, options):
    waves = music(700, 30_000, 2_000)
    at_once = list(small.embed(waves, **options))
    for pooled, states in zip(small.embed(waves, pool="mean", **options), at_once, strict=True):
        np.testing.assert_allclose(pooled, states.mean(1), atol=1e-5)
    for layers in ((0,), (small.num_layers,), (2, 0)):
        for some, states in zip(small.embed(waves, layers=layers, **options), at_once, strict=True):
            np.testing.assert_allclose(some, states[list(layers)], atol=1e-5)


def test_layers_above_the_requested_ones_are_not_computed():
    model = embedder.Model(checkpoint())
    broken = jax.tree.map(lambda x: x.copy(), model.params)
    broken["encoder"]["layers"]["attention"]["v_proj"]["kernel"][1:] = np.nan
    model.params = broken
    (wave,) = music(700)
    assert np.isfinite(next(model.embed([wave], layers=(1,)))).all()
    assert not np.isfinite(next(model.embed([wave], layers=(2,)))).all()


def test_batches_of_waves_and_other_rates(small):
    waves = np.stack(music(2_000, 2_000))
    states = small(waves)
    assert states.shape[:2] == (small.num_layers + 1, 2)
    np.testing.assert_allclose(states[:, 1], small(waves[1]), atol=1e-5)
    assert small(waves[0], sample_rate=48_000).shape[1] == small(waves[0][:1_000]).shape[1]


def test_every_kind_of_checkpoint_is_loaded(tmp_path):
    small = checkpoint()
    small = small._replace(about=small.about._replace(sample_rate=16_000))
    (tmp_path / "hf").mkdir()
    huggingface.write_checkpoint(str(tmp_path / "hf"), small)
    workdir.write_checkpoint(str(tmp_path / "run"), small)
    (wave,) = music(2_000)
    expected = embedder.Model(small)(wave, sample_rate=16_000)
    for name in ("hf", "run"):
        model = mert_jax.load(str(tmp_path / name))
        assert model.sample_rate == 16_000
        assert model.frame_rate == 800
        np.testing.assert_allclose(model(wave, sample_rate=16_000), expected, atol=1e-6)


def test_fingerprints_change_with_weights_and_preprocessing(small):
    assert small.fingerprint == embedder.Model(small_checkpoint(small)).fingerprint
    other = small_checkpoint(small)
    for changed in (
        other._replace(about=other.about._replace(do_normalize=True)),
        other._replace(params=jax.tree.map(lambda x: x + 1, other.params)),
    ):
        assert embedder.Model(changed).fingerprint != small.fingerprint
    random = small.reinitialised(0)
    assert random.fingerprint == small.reinitialised(0).fingerprint
    assert random.fingerprint != small.reinitialised(1).fingerprint
    assert random(music(700)[0]).shape == small(music(700)[0]).shape


def small_checkpoint(model):
    return in_memory.Checkpoint(model.student, model.params, None, 0, model.about)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (9,)}, "layer 9 of a model with 0"),
        ({"chunk": 1.0, "context": 0.5}, "no room for 0.5 s"),
        ({"window": 1e-4}, "windows of 2 samples"),
        ({"pool": "max"}, "not none or mean"),
    ],
)
def test_impossible_settings_are_refused(small, options, message):
    with pytest.raises(UserError, match=message):
        next(small.embed(music(700), **options))


def test_unusable_waves_are_refused(small):
    with pytest.raises(UserError, match="29 samples; a frame needs 30"):
        small(np.zeros(29))
    with pytest.raises(UserError, match="not finite"):
        small(np.full(700, np.nan))
    with pytest.raises(UserError, match=r"\(2, 3, 700\)"):
        small(np.zeros((2, 3, 700)))
    assert np.isfinite(small(np.zeros(700))).all()
