"""Mixes: which of fifteen instruments play together, two to four at a time.

All play the same drawn chords, each its own part: held chords, broken chords, a line, a bass.
"""

import numpy as np

from mert_jax.synthetic.fonts import DRUMS, Fonts, Note
from mert_jax.synthetic.recipe import Clip, Recipe, rng, vary

SECONDS = 4.0
# programs of General MIDI, the range, and whether it may play chords
INSTRUMENTS = {
    "piano": ([0, 1], (45, 84), True),
    "electric piano": ([4, 5], (45, 84), True),
    "vibraphone": ([11], (55, 86), True),
    "organ": ([16, 19], (45, 84), True),
    "accordion": ([21], (53, 84), True),
    "acoustic guitar": ([24, 25], (42, 76), True),
    "distorted guitar": ([29, 30], (40, 72), True),
    "bass": ([32, 33], (28, 48), False),
    "violin": ([40], (57, 88), False),
    "string ensemble": ([48], (45, 84), True),
    "choir": ([52], (48, 76), True),
    "trumpet": ([56], (56, 80), False),
    "saxophone": ([64, 66], (56, 75), False),
    "flute": ([73], (62, 91), False),
    "drums": ([DRUMS], (0, 0), False),
}
LABELS = tuple(INSTRUMENTS)
CLIPS = {"train": 700, "val": 150, "test": 250}
SMALL = {"train": 8, "val": 4, "test": 4}
TRIADS = ((0, 4, 7), (2, 5, 9), (4, 7, 11), (5, 9, 0), (7, 11, 2), (9, 0, 4))  # of a major key
KICK, SNARE, HAT = 36, 38, 42


def mix(fonts: Fonts, small: bool = False) -> Recipe:
    """Which instruments sound (15 tags), two to four of them."""
    clips = []
    for split, count in (SMALL if small else CLIPS).items():
        names = _balanced(count, rng("made_mix", split))
        clips += [_clip(fonts, split, chosen, i) for i, chosen in enumerate(names)]
    about = {
        "source": "drawn parts over drawn chords, General MIDI instruments, rendered",
        "split": "train and val: other mixes of one font; test: another font",
        "fonts": {"train": fonts.train.about, "test": fonts.test.about},
    }
    return Recipe(clips, about)


def _balanced(count: int, draw: np.random.Generator) -> list[list[str]]:
    """Sets of two to four instruments, each instrument about equally often."""
    used = dict.fromkeys(LABELS, 0)
    sets = []
    for _ in range(count):
        size = int(draw.integers(2, 5))
        # the rarest so far first, ties in a drawn order: names are not paired for ever
        noise = dict(zip(LABELS, draw.uniform(0, 6, len(LABELS)), strict=True))
        chosen = sorted(LABELS, key=lambda name: used[name] + noise[name])[:size]
        for name in chosen:
            used[name] += 1
        sets.append(sorted(chosen))
    return sets


def _clip(fonts: Fonts, split: str, names: list[str], i: int) -> Clip:
    font = fonts.of(split)
    draw = rng("made_mix", split, i)
    beat = 60 / draw.uniform(80, 150)
    key = int(draw.integers(12))
    chords = [TRIADS[k] for k in draw.integers(len(TRIADS), size=int(SECONDS / beat / 2) + 1)]
    notes, programs = [], []
    for name in names:
        options, span, chordal = INSTRUMENTS[name]
        program = options[int(draw.integers(len(options)))]
        programs.append(program)
        loudness = int(draw.integers(70, 115))
        if program == DRUMS:
            notes += _drums(beat, loudness, draw)
        else:
            how = draw.choice(["held", "broken", "line"] if chordal else ["line"])
            notes += _part(how, program, span, key, chords, beat, loudness, draw)
    made_of = {"font": font.name, "programs": programs}
    wave = lambda: vary(font.play(notes, SECONDS), draw)
    return Clip(split, names, made_of, wave)


def _part(
    how: str,
    program: int,
    span: tuple[int, int],
    key: int,
    chords: list[tuple[int, ...]],
    beat: float,
    loudness: int,
    draw: np.random.Generator,
) -> list[Note]:
    """Two beats of each chord: held, broken in quavers, or a line of crotchets and quavers."""
    notes = []
    low, high = span
    at = int(draw.integers(low, high + 1))
    for k, chord in enumerate(chords):
        start = 2 * k * beat
        tones = [p for p in range(low, high + 1) if (p - key) % 12 in chord]
        near = sorted(tones, key=lambda p: (abs(p - at), p))
        if how == "held":
            chosen = [(start, 2 * beat, p) for p in near[:3]]
        elif how == "broken":
            some = sorted(near[:4])
            chosen = [(start + j * beat / 2, beat / 2, some[j % len(some)]) for j in range(4)]
        else:
            length = beat if draw.uniform() < 0.5 else beat / 2
            count = round(2 * beat / length)
            picks = draw.integers(0, min(4, len(near)), count)
            chosen = [(start + j * length, length, near[p]) for j, p in enumerate(picks)]
            at = chosen[-1][2]
        for begin, length, p in chosen:
            velocity = int(np.clip(loudness + draw.integers(-10, 11), 1, 127))
            notes.append(Note(begin, begin + 0.95 * length, p, velocity, program))
    return notes


def _drums(beat: float, loudness: int, draw: np.random.Generator) -> list[Note]:
    notes = []
    for half in range(int(2 * SECONDS / beat) + 1):
        drums = [HAT] if half % 2 else [HAT, SNARE if half % 4 else KICK]
        if half % 2 and draw.uniform() < 0.2:
            drums.append(KICK)
        start = half * beat / 2
        notes += [Note(start, start + 0.1, drum, loudness, DRUMS) for drum in drums]
    return notes
