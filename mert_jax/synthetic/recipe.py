"""Probe datasets that can be made anywhere: one module a kind of music, one folder a task.

A maker returns a `Recipe`, its clips still to be rendered; `clips.write` renders and writes them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

SAMPLE_RATE = 24_000  # that of MERT; nothing is resampled when probing
SPLITS = ("train", "val", "test")
SEED = 20_240


class Clip(NamedTuple):
    """One example: its split, its label, what it is made of, and the audio.

    label: a class, a list of tags, or {"beat": seconds}, as in MARBLE's lists. made_of: font,
    instrument, tune, kit...
    wave: makes the samples f32[N] at SAMPLE_RATE.
    """

    split: str
    label: Any
    made_of: dict[str, Any]
    wave: Callable[[], np.ndarray]


class Recipe(NamedTuple):
    """The clips of a task, and what its about.json says: sources, licences, versions, counts."""

    clips: Sequence[Clip]
    about: dict[str, Any]


def rng(*names: object) -> np.random.Generator:
    """The generator of whatever `names` say: equal names, equal numbers, on every machine."""
    words = "/".join(map(str, names)).encode()
    return np.random.default_rng([SEED, *words])


def vary(
    wave: np.ndarray, draw: np.random.Generator, below: tuple[float, float] = (40, 70)
) -> np.ndarray:
    """`wave` at a drawn level and over a little drawn noise, so that neither tells the label.

    Peaks lie at -20 to -1 dB of full scale, white noise `below` [dB] the peak, by default 40 to 70.
    """
    peak = float(np.abs(wave).max())
    noise = draw.standard_normal(len(wave)).astype(np.float32)
    wave = wave / peak + 10 ** (-draw.uniform(*below) / 20) * noise
    return (10 ** (-draw.uniform(1, 20) / 20) / np.abs(wave).max() * wave).astype(np.float32)
