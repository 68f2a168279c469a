"""A tune with an accompaniment, as notes in seconds."""

from collections.abc import Callable

import numpy as np

from mert_jax.synthetic.fonts import DRUMS, Note
from mert_jax.synthetic.tunes import Tune, harmony

LEADS = (0, 21, 22, 24, 40, 56, 64, 68, 71, 73, 74)
BACKINGS = (0, 4, 6, 16, 21, 24, 25, 46, 48)
STYLES = ("alone", "block", "bass and chord", "broken")
BASS, MIDDLE = 36, 55  # lowest pitch of the bass and of the chords
KICK, SNARE, HAT = 36, 38, 42


def play(
    tune: Tune,
    style: str,
    lead: int,
    backing: int,
    until: float,
    clock: Callable[[float], float],
    draw: np.random.Generator,
    drums: bool = False,
) -> list[Note]:
    """`tune` from its first bar, again and again, up to `until` crotchets.

    style: one of STYLES; lead, backing: programs; clock: crotchets to seconds.
    """
    loudness, length = int(draw.integers(75, 115)), tune.bars * tune.beats * tune.beat
    notes = []

    def add(at: float, duration: float, pitch: int, softer: int, program: int) -> None:
        if at < until:
            # players are some milliseconds off the beat, and not always equally loud
            early = draw.normal(0, 0.006)
            start, stop = clock(at) + early, clock(at + 0.92 * duration) + early
            velocity = int(np.clip(loudness - softer + draw.integers(-8, 9), 1, 127))
            notes.append(Note(max(start, 0.0), max(stop, start + 0.03), pitch, velocity, program))

    chords = harmony(tune)
    for turn in range(int(until / length) + 1):
        for at, duration, pitch in tune.notes:
            add(turn * length + at, duration, pitch, 0, lead)
        for bar, chord in enumerate(chords):
            first = turn * length + bar * tune.beats * tune.beat
            for at, duration, pitch in _backing(style, chord, tune):
                add(first + at, duration, pitch, 20, backing)
            for at, drum in _drums(tune) if drums else ():
                add(first + at, 0.2, drum, 10, DRUMS)
    return notes


def _backing(style: str, chord: tuple[int, ...], tune: Tune) -> list[tuple[float, float, int]]:
    """One bar: (onset, length) in crotchets and MIDI pitch."""
    root = BASS + (chord[0] - BASS) % 12
    middle = sorted(MIDDLE + (x - MIDDLE) % 12 for x in chord)
    whole = tune.beats * tune.beat
    if style == "alone":
        return []
    if style == "block":
        return [(0.0, whole, pitch) for pitch in (root, *middle)]
    if style == "broken":
        step = tune.beat / (3 if tune.beat == 1.5 else 2)
        order = (middle[0], middle[2], middle[1], middle[2])
        count = round(whole / step)
        return [(0.0, whole, root)] + [(i * step, step, order[i % 4]) for i in range(count)]
    after = [i * tune.beat for i in range(1, tune.beats)] if tune.beats > 2 else [whole / 2]
    return [(0.0, tune.beat, root)] + [(at, tune.beat / 2, p) for at in after for p in middle]


def _drums(tune: Tune) -> list[tuple[float, int]]:
    found = []
    for beat in range(tune.beats):
        at = beat * tune.beat
        found += [(at, HAT), (at + tune.beat * (2 / 3 if tune.beat == 1.5 else 1 / 2), HAT)]
        found.append((at, KICK if beat == 0 or (beat == 2 and tune.beats == 4) else SNARE))
    return found
