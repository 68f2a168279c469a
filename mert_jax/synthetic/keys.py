"""The key of a tune: printed tunes in major and minor, put into all twelve keys, with chords."""

import numpy as np

from mert_jax.synthetic.fonts import Fonts
from mert_jax.synthetic.playing import BACKINGS, LEADS, STYLES, play
from mert_jax.synthetic.recipe import Clip, Recipe, rng, vary
from mert_jax.synthetic.tunes import LICENCE, TONICS, Tune, divide, sure, transpose

SECONDS = 6.0
# spelt as in MARBLE's GiantSteps list (marble/tasks/GS)
LABELS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
TUNES = 200  # a mode, where there are as many
CLIPS = {"train": 30, "val": 7, "test": 10}  # a key
SMALL = {"train": 1, "val": 1, "test": 1}


def key(fonts: Fonts, small: bool = False) -> Recipe:
    """Which key (24 classes). Each tune is in one split alone; in minor, of which there are fewer,
    in several keys."""
    clips = []
    for mode in ("major", "minor"):
        tunes = divide(sure(mode, 7 if small else TUNES))
        for split, count in (SMALL if small else CLIPS).items():
            for i in range(12 * count):
                # tunes go round while keys do: each tune comes in keys far from each other
                tune, tonic = tunes[split][i % len(tunes[split])], i % 12
                clips.append(_clip(fonts, split, tune, tonic, i))
    about = {
        "source": f"tunes of music21's corpus, chords put to them, rendered; {LICENCE}",
        "split": "by tune; train and val: one font; test: another font",
        "fonts": {"train": fonts.train.about, "test": fonts.test.about},
    }
    return Recipe(clips, about)


def in_key(tune: Tune, tonic: int) -> Tune:
    """`tune` in the key of `tonic`, by the shortest way, and its middle about C5."""
    higher = (tonic - tune.header.tonic + 5) % 12 - 5
    middle = float(np.median([pitch for *_, pitch in tune.notes])) + higher
    return transpose(tune, higher + 12 * round((72 - middle) / 12))


def _clip(fonts: Fonts, split: str, tune: Tune, tonic: int, i: int) -> Clip:
    font, mode = fonts.of(split), tune.header.mode
    label = f"{TONICS[tonic]} {mode}"

    def wave() -> np.ndarray:
        draw = rng("made_key", label, split, i)
        moved = in_key(tune, tonic)
        tempo = draw.uniform(90, 150)  # crotchets a minute
        clock = lambda at: 0.1 + at * 60 / tempo
        style, lead, backing = (_one(draw, x) for x in (STYLES, LEADS, BACKINGS))
        notes = play(moved, style, lead, backing, SECONDS * tempo / 60, clock, draw)
        return vary(font.play(notes, SECONDS, tuning=draw.uniform(-0.2, 0.2)), draw)

    made_of = {"font": font.name, "tune": tune.header.title, "of": tune.header.collection}
    return Clip(split, label, made_of, wave)


def _one(draw: np.random.Generator, values: tuple):
    return values[int(draw.integers(len(values)))]
