"""Playing techniques: how a guitar, a bass, strings or a trumpet is played.

A few notes at one instrument's pitches, whatever the technique: the pitch must not tell it.
"""

import numpy as np

from mert_jax.synthetic.fonts import Fonts, Note
from mert_jax.synthetic.recipe import Clip, Recipe, rng, vary

SECONDS = 2.5
# lowest and highest pitch, and the General MIDI programs of each technique
FAMILIES = {
    "guitar": (
        (43, 71),
        {"clean": [27], "muted": [28], "overdriven": [29], "distorted": [30], "harmonics": [31]},
    ),
    "bass": (
        (28, 52),
        {"acoustic": [32], "finger": [33], "pick": [34], "fretless": [35], "slap": [36, 37]},
    ),
    "strings": ((48, 79), {"bowed": [48], "tremolo": [44], "pizzicato": [45]}),
    "trumpet": ((56, 80), {"open": [56], "muted": [59]}),
}
LABELS = tuple(f"{family}: {name}" for family, (_, found) in FAMILIES.items() for name in found)
CLIPS = {"train": 50, "val": 12, "test": 16}  # a technique
SMALL = {"train": 2, "val": 1, "test": 1}


def technique(fonts: Fonts, small: bool = False) -> Recipe:
    """Which technique (15 classes); one to four notes, one after the other."""
    clips = [
        _clip(fonts, split, family, name, i)
        for family, (_, techniques) in FAMILIES.items()
        for name in techniques
        for split, count in (SMALL if small else CLIPS).items()
        for i in range(count)
    ]
    about = {
        "source": "short phrases in General MIDI articulations, rendered",
        "split": "train and val: other phrases of one font; test: another font",
        "fonts": {"train": fonts.train.about, "test": fonts.test.about},
    }
    return Recipe(clips, about)


def _clip(fonts: Fonts, split: str, family: str, name: str, i: int) -> Clip:
    (low, high), techniques = FAMILIES[family]
    font, label = fonts.of(split), f"{family}: {name}"
    draw = rng("made_technique", label, split, i)
    program = techniques[name][i % len(techniques[name])]
    count = int(draw.integers(1, 5))
    starts = draw.uniform(0, 0.2) + np.arange(count) * draw.uniform(0.3, 0.5)
    pitches = draw.integers(low, high + 1) + np.append(0, draw.integers(-5, 6, count - 1)).cumsum()
    pitches = np.clip(pitches, low, high)
    held = draw.uniform(0.5, 1.0)
    notes = []
    for k, start in enumerate(starts):
        stop = starts[k + 1] if k + 1 < count else start + draw.uniform(0.4, 1.2)
        last = float(start + held * (stop - start))
        velocity = int(draw.integers(60, 120))
        notes.append(Note(float(start), last, int(pitches[k]), velocity, program))
    tuning = draw.uniform(-0.2, 0.2)
    made_of = {"font": font.name, "program": program, "pitches": [n.pitch for n in notes]}
    wave = lambda: vary(font.play(notes, SECONDS, tuning=tuning), draw)
    return Clip(split, label, made_of, wave)
