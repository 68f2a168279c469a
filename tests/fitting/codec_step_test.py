"""One update of a codec: the loss falls, the quantiser is residual, dead codes are revived."""

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.fitting import codec_step
from mert_jax.models import quantize

SIZES = dict(filters=2, dim=8, books=2, size=16)
CODEC = codec_step.Codec(**SIZES, learning_rate=1e-3, total_steps=100, decay=0.9)


def clips() -> np.ndarray:
    t = np.arange(6400) / 24_000
    tones = [np.sin(2 * np.pi * f * t) for f in (220, 330, 440, 550)]
    return (8000 * np.stack(tones)).astype(np.int16)


def new_state() -> codec_step.CodecState:
    return jax.jit(lambda key: codec_step.init(CODEC, key))(jax.random.key(0))


def test_the_loss_falls():
    state, key = new_state(), jax.random.key(1)
    step = jax.jit(lambda state, clips: codec_step.train_step(state, clips, key, CODEC))
    losses = []
    for _ in range(30):
        state, metrics = step(state, clips())
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 30
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_haikus_residual_codes_are_those_of_the_teacher():
    state = new_state()
    latents = jax.random.normal(jax.random.key(1), (2, 5, 8))
    output, _ = CODEC.quantizer.apply({}, state.quantizer, None, latents, False)
    books = codec_step.codebooks(state.quantizer)
    assert books.shape == (2, 16, 8)
    codes, squares = quantize.residual_encode(latents, books)
    np.testing.assert_array_equal(output["codes"], codes)
    np.testing.assert_allclose(
        output["quantized"], quantize.residual_decode(codes, books), atol=1e-5
    )
    np.testing.assert_allclose(
        jnp.square(latents - output["quantized"]).sum(-1), squares[..., -1], rtol=1e-4
    )


def test_dead_codes_are_revived():
    quantizer = new_state().quantizer
    name = "book_1"
    sizes = quantizer[f"{name}/~/ema_cluster_size"]
    used = jnp.full(16, 4.0).at[3].set(0.01)
    quantizer = dict(quantizer)
    quantizer[f"{name}/~/ema_cluster_size"] = sizes | {"average": used, "hidden": used / 2}
    vectors = [jax.random.normal(jax.random.key(k), (64, 8)) for k in range(2)]
    revived, revived_codes = codec_step.revive(quantizer, vectors, jax.random.key(2), 0.1)
    assert revived_codes.tolist() == [16, 1]  # the first book has never been used
    before, after = (codec_step.codebooks(q)[1] for q in (quantizer, revived))
    assert (np.abs(before - after).max(1) > 0).tolist() == [k == 3 for k in range(16)]
    assert (np.asarray(vectors[1]) == np.asarray(after[3])).all(1).any()
    again, revived_codes = codec_step.revive(revived, vectors, jax.random.key(3), 0.1)
    assert revived_codes.tolist() == [0, 0]
    jax.tree.map(np.testing.assert_array_equal, again, revived)


def test_si_sdr_of_noise_at_a_known_level():
    rng = np.random.default_rng(0)
    wave = rng.normal(size=(1, 10_000)).astype(np.float32)
    noise = rng.normal(size=(1, 10_000)).astype(np.float32)
    noise -= (noise @ wave.T) / (wave @ wave.T) * wave
    other = 3 * (wave + 0.1 * noise)  # at any scale
    np.testing.assert_allclose(codec_step.si_sdr(wave, other), 20, atol=0.2)


def test_mel_distance_of_a_halved_wave():
    wave = 0.3 * np.random.default_rng(0).normal(size=(2, 6400)).astype(np.float32)
    assert codec_step.mel_distance(wave, wave).tolist() == [0, 0]
    halved = codec_step.mel_distance(wave, wave / 2)
    np.testing.assert_allclose(halved, np.log(4), rtol=0.01)
