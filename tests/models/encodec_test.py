"""The codec's networks: causal, the same in pieces as in one go, and mirrored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.models import encodec

ENCODER = encodec.Encoder(filters=2, dim=8)
PIECE = 3200


@functools.cache
def params():
    return jax.jit(ENCODER.init)(jax.random.key(0), jnp.zeros((1, 640)))["params"]


def wave(samples: int, clips: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(clips, samples)).astype(np.float32)


@jax.jit
def apply(params, wave):
    return ENCODER.apply({"params": params}, wave)


def encode(wave):
    return apply(params(), wave)


@jax.jit
def piece(params, state, wave, start, length):
    stream = encodec.Stream(start, length)
    return ENCODER.apply({"params": params, **state}, wave, stream, mutable=["stream"])


def in_pieces(tracks: list[np.ndarray]) -> list[np.ndarray]:
    """Latents of tracks [N] of any lengths, side by side; what a row held before is rubbish."""
    rows = len(tracks)
    wave, start, length = jnp.zeros((rows, PIECE)), jnp.ones(rows, bool), jnp.ones(rows, int)
    shapes = jax.eval_shape(piece, params(), {}, wave, start, length)
    state = jax.tree.map(lambda x: jnp.full(x.shape, 9.0), shapes[1])
    found = []
    for offset in range(0, max(map(len, tracks)), PIECE):
        parts = [track[offset : offset + PIECE] for track in tracks]
        rubbish = np.full((rows, PIECE), 5, np.float32)
        for row, part in zip(rubbish, parts, strict=True):
            row[: len(part)] = part
        lengths = jnp.array([len(part) for part in parts])
        latents, state = piece(params(), state, rubbish, jnp.full(rows, offset == 0), lengths)
        found.append(latents)
    whole = np.concatenate(found, 1)
    return [x[: -(-len(track) // 320)] for x, track in zip(whole, tracks, strict=True)]


@pytest.mark.parametrize("samples", [1, 5, 319, 320, 321, 641, 4000])
def test_frames(samples):
    latents = encode(wave(samples))
    assert latents.shape == (1, -(-samples // 320), 8)
    assert np.isfinite(latents).all()


def test_no_frame_sees_a_later_sample():
    x = wave(6400)
    y = x.copy()
    y[:, 3200:] = 0  # frame 9 ends with sample 3199; the first 6 are reflected before the start
    first, second = encode(x)[0], encode(y)[0]
    np.testing.assert_allclose(first[:10], second[:10], atol=1e-6)
    assert np.abs(first[10] - second[10]).max() > 1e-4


@pytest.mark.parametrize("last", [1, 2, 7, 8, 39, 40, 41, 319, 320, 1601, 3199, 3200])
def test_pieces_are_the_whole(last):
    """Whatever is left for the last piece, of which only so many samples are the track's."""
    track = wave(2 * PIECE + last)[0]
    (ours,) = in_pieces([track])
    np.testing.assert_allclose(ours, encode(track[None])[0], atol=1e-5)


def test_tracks_of_different_lengths_side_by_side():
    tracks = [wave(n, seed=n)[0] for n in (2 * PIECE + 50, 2300, 3 * PIECE)]
    for ours, track in zip(in_pieces(tracks), tracks, strict=True):
        np.testing.assert_allclose(ours, encode(track[None])[0], atol=1e-5)


def test_a_short_signal_is_padded_as_encodec_does():
    """torch's reflection needs more samples than it adds; zeros are put behind first."""
    x = np.arange(1, 4, dtype=np.float32).reshape(1, 3, 1)
    padded = encodec.reflect_pad(jnp.asarray(x), 5, 0)[0, :, 0]
    np.testing.assert_array_equal(padded, [0, 0, 0, 3, 2, 1, 2, 3])


def test_decoder():
    decoder = encodec.Decoder(filters=2)
    latents = jnp.asarray(wave(8 * 20).reshape(1, 20, 8))
    variables = jax.jit(decoder.init)(jax.random.key(0), latents)
    out = jax.jit(decoder.apply)(variables, latents)
    assert out.shape == (1, 6400)
    changed = jax.jit(decoder.apply)(variables, latents.at[:, 10:].set(0))
    np.testing.assert_allclose(out[:, :3200], changed[:, :3200], atol=1e-5)
    assert np.abs(out - changed)[:, 3200:].max() > 1e-5
