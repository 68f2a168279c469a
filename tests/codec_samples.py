"""A small random codec and synthetic music, for tests of codes and of codec checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.constants import SAMPLE_RATE
from mert_jax.models import encodec
from mert_jax.teachers import encodec_checkpoint

BOOKS, SIZE, DIM = 3, 16, 8


@functools.cache
def params() -> dict:
    """Return the parameters of a random codec; its biases are not zero, so that a mix-up shows."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = jnp.zeros((1, 640)), jnp.zeros((1, 8, DIM))
    parts = {
        "encoder": jax.jit(encodec.Encoder(2, DIM).init)(keys[0], shapes[0])["params"],
        "decoder": jax.jit(encodec.Decoder(2).init)(keys[1], shapes[1])["params"],
        "codebooks": jax.random.normal(keys[2], (BOOKS, SIZE, DIM)),
    }

    def add_noise(x: jax.Array) -> np.ndarray:
        noise = 0.1 * np.random.default_rng(x.size).normal(size=x.shape)
        return np.asarray(np.asarray(x) + noise, np.float32)

    return jax.tree.map(add_noise, parts)


def music(seconds: float, seed: int) -> np.ndarray:
    """Return chords of four random notes and some noise, f64 [N]."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitches = rng.uniform(80, 900, (int(seconds * 4) + 1, 4))
    notes = pitches.repeat(SAMPLE_RATE // 4, 0)[: len(t)].T
    return 0.1 * np.sin(2 * np.pi * notes * t).sum(0) + 0.02 * rng.normal(size=len(t))


def write_codec(folder: str) -> str:
    """Write a small random codec whose codebooks are latents of music, so that codes vary."""
    network = encodec.Encoder(2, DIM)
    wave = music(4, 9)[None].astype(np.float32)
    latents = np.asarray(jax.jit(network.apply)({"params": params()["encoder"]}, wave))[0]
    rows = np.random.default_rng(0).choice(latents, (BOOKS, SIZE), replace=False)
    spread = rows - latents.mean(0)
    codebooks = np.stack([rows[0], *(0.5 * spread[1:])])
    encodec_checkpoint.write_encodec(folder, params() | {"codebooks": codebooks})
    return folder
