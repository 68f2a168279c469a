"""Single notes: which pitch, and which instrument.

Notes of a draw of loudness, length, onset and tuning; the test is on a font not trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mert_jax.synthetic.fonts import Fonts, Note
from mert_jax.synthetic.instruments import DISTINCT, PITCHED, Instrument
from mert_jax.synthetic.recipe import Clip, Recipe, rng, vary

SECONDS = 2.0
PITCHES = tuple(range(36, 92))  # C2 to G6: at least ten instruments play each
PITCH_LABELS = tuple(str(pitch) for pitch in PITCHES)
INSTRUMENT_LABELS = tuple(instrument.name for instrument in DISTINCT)
PITCH_CLIPS = {"train": 10, "val": 4, "test": 6}  # a pitch
INSTRUMENT_CLIPS = {"train": 32, "val": 6, "test": 8}  # an instrument
SMALL = {"train": 2, "val": 1, "test": 1}


class Ranges(NamedTuple):
    """What is drawn: seconds of a note, semitones out of tune, noise in dB below the peak."""

    length: tuple[float, float]
    tuning: float
    below: tuple[float, float]


NOTES = Ranges((0.4, 1.6), 0.2, (40, 70))
PITCH_NOTES = Ranges((0.08, 0.5), 0.4, (6, 30))
ABOUT = {
    "source": "single notes of General MIDI instruments, rendered",
    "split": "train and val: other notes of one font; test: another font",
}


def pitch(fonts: Fonts, small: bool = False) -> Recipe:
    """Which MIDI pitch (56 classes), of 44 instruments; val has other instruments for a pitch than
    train. Short notes in noise, out of tune by up to 0.4 semitones: long ones in tune, a linear
    head reads off a CQT (0.99)."""
    clips = []
    for number in PITCHES[:: 8 if small else 1]:
        draw = rng("made_pitch", number)
        playing = [x for x in PITCHED if number in x.pitches]
        held = _held(playing, len(playing) // 5, draw)
        for split, count in (SMALL if small else PITCH_CLIPS).items():
            for i in range(count):
                instrument = held[split][i % len(held[split])]
                label = str(number)
                clips.append(
                    _clip("made_pitch", fonts, split, label, instrument, number, i, PITCH_NOTES)
                )
    return Recipe(clips, _about(fonts))


def instrument(fonts: Fonts, small: bool = False) -> Recipe:
    """Which instrument (32 classes), over its range; val has other pitches of it than train."""
    clips = []
    for each in DISTINCT[:: 8 if small else 1]:
        draw = rng("made_instrument", each.name)
        held = _held(list(each.pitches), len(each.pitches) // 5, draw)
        for split, count in (SMALL if small else INSTRUMENT_CLIPS).items():
            for i in range(count):
                number = held[split][i % len(held[split])]
                clips.append(
                    _clip("made_instrument", fonts, split, each.name, each, number, i, NOTES)
                )
    return Recipe(clips, _about(fonts))


def _held(values: Sequence, count: int, draw: np.random.Generator) -> dict[str, list]:
    """`values` in a drawn order: `count` for val, the others for train, all for test."""
    order = [values[i] for i in draw.permutation(len(values))]
    return {"train": order[count:], "val": order[:count], "test": order}


def _clip(
    task: str,
    fonts: Fonts,
    split: str,
    label: str,
    instrument: Instrument,
    number: int,
    i: int,
    ranges: Ranges,
) -> Clip:
    font = fonts.of(split)

    def wave() -> np.ndarray:
        draw = rng(task, label, split, i)
        start = draw.uniform(0, 0.3)
        stop = start + draw.uniform(*ranges.length)
        note = Note(start, stop, number, int(draw.integers(50, 120)), instrument.program)
        tuning = draw.uniform(-ranges.tuning, ranges.tuning)
        return vary(font.play([note], SECONDS, tuning=tuning), draw, ranges.below)

    made_of = {"font": font.name, "instrument": instrument.name, "pitch": number}
    return Clip(split, label, made_of, wave)


def _about(fonts: Fonts) -> dict:
    return ABOUT | {"fonts": {"train": fonts.train.about, "test": fonts.test.about}}
