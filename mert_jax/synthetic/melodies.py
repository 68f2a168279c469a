"""Datasets of folk tunes with accompaniment: their key, and the times of their beats."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from mert_jax.synthetic.dataset import SPLITS, Clip, Recipe, Rng, numbered, rng
from mert_jax.synthetic.fonts import DRUMS, HAT, KICK, SNARE, Fonts, Note
from mert_jax.synthetic.tunes import Tune, agrees_with_key, harmony, headers, shuffled_tunes

SOURCE = (
    "tunes of music21's corpus, chords put to them, rendered; tunes: public domain (printed 1782 "
    "to 1903); encodings: redistributed by music21 with the permission of their transcribers, see "
    "its corpus/license.txt"
)
SPLIT = "by tune; train and val: one font"
TONICS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
STYLES = ("alone", "block", "bass and chord", "broken")
LEADS = (0, 21, 22, 24, 40, 56, 64, 68, 71, 73, 74)  # programs of the melody
BACKINGS = (0, 4, 6, 16, 21, 24, 25, 46, 48)  # programs of the chords
SOUNDS = (STYLES, LEADS, BACKINGS)
BASS, MIDDLE = 36, 55  # lowest pitch of the bass and of the chords
# spelt as in MARBLE's GiantSteps list (marble/tasks/GS)
KEY_LABELS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
KEY_TUNES = 200  # of each mode, at most
KEY_SECONDS, KEY_CLIPS = 6.0, (30, 7, 10)  # of each key, in train, val and test
BEAT_SECONDS, BEAT_CLIPS, BEAT_SMALL = 8.0, (275, 75, 150), (4, 2, 3)
BEAT_TEMPI = (65, 165)  # beats a minute
Clock = Callable[[float], float]


def key(fonts: Fonts, small: bool = False) -> Recipe:
    """Tunes transposed into all keys, with 24 keys as classes; each tune is in one split only."""
    clips = []
    for mode in ("major", "minor"):
        in_mode = [header for header in headers() if header.mode == mode]
        certain = filter(agrees_with_key, shuffled_tunes(in_mode, rng("tunes", mode)))
        tunes = list(itertools.islice(certain, 7 if small else KEY_TUNES))
        ends = 0, round(0.55 * len(tunes)), round(0.7 * len(tunes)), len(tunes)
        parts = [tunes[begin:end] for begin, end in itertools.pairwise(ends)]
        counts = (1, 1, 1) if small else KEY_CLIPS
        for split, part, count in zip(SPLITS, parts, counts, strict=True):
            # the clips of one tune are in keys far from each other
            clips += [_key_clip(fonts, split, i, part[i % len(part)]) for i in range(12 * count)]
    return fonts.recipe(clips, SOURCE, SPLIT)


def _key_clip(fonts: Fonts, split: str, i: int, tune: Tune) -> Clip:
    label = f"{TONICS[i % 12]} {tune.header.mode}"
    draw = rng("made_key", label, split, i)
    tempo = draw.uniform(90, 150)  # crotchets a minute

    def clock(at: float) -> float:
        return 0.1 + at * 60 / tempo

    sound = [x[draw.integers(len(x))] for x in SOUNDS]
    notes = play(transpose(tune, i % 12), sound, KEY_SECONDS * tempo / 60, clock, draw)
    made_of = {"tune": tune.header.title, "of": tune.header.collection}
    tuning = draw.uniform(-0.2, 0.2)
    return fonts.clip(split, label, made_of, draw, notes, KEY_SECONDS, tuning)


def beat(fonts: Fonts, small: bool = False) -> Recipe:
    """Tunes with the times of their beats: crotchets, in 6/8 and 9/8 dotted ones. A clip a tune."""
    # the beat of C| may be felt as minims or as crotchets
    tunes = shuffled_tunes([x for x in headers() if x.metre != "C|"], rng("made_beat"))
    counts = numbered(*(BEAT_SMALL if small else BEAT_CLIPS))
    return fonts.recipe([_beat_clip(fonts, *x, next(tunes)) for x in counts], SOURCE, SPLIT)


def _beat_clip(fonts: Fonts, split: str, i: int, tune: Tune) -> Clip:
    draw = rng("made_beat", split, i)
    times = beat_times(int(BEAT_SECONDS * BEAT_TEMPI[1] / 60 * 1.3) + 2, draw)
    label = {"beat": [round(float(t), 4) for t in times if t < BEAT_SECONDS]}

    def clock(at: float) -> float:
        return float(np.interp(at / tune.beat, np.arange(len(times)), times))

    sound = [x[draw.integers(len(x))] for x in SOUNDS]
    drums = draw.uniform() < 0.5
    notes = play(tune, sound, len(label["beat"]) * tune.beat, clock, draw, drums)
    made_of = {"tune": tune.header.title, "of": tune.header.collection}
    return fonts.clip(split, label, made_of, draw, notes, BEAT_SECONDS)


def transpose(tune: Tune, tonic: int) -> Tune:
    """Return `tune` in the key of `tonic`, its median pitch near C5."""
    higher = (tonic - tune.header.tonic + 5) % 12 - 5
    middle = float(np.median([pitch for *_, pitch in tune.notes])) + higher
    higher += 12 * round((72 - middle) / 12)
    notes = tuple((at, length, pitch + higher) for at, length, pitch in tune.notes)
    return tune._replace(header=tune.header._replace(tonic=tonic), notes=notes)


def beat_times(count: int, draw: Rng) -> np.ndarray:
    """Return times [seconds] of `count` beats; the tempo drifts by at most a sixth."""
    drift = np.zeros(count)
    for i in range(1, count):
        drift[i] = np.clip(0.95 * drift[i - 1] + draw.normal(0, 0.02), -1 / 6, 1 / 6)
    period = 60 / np.exp(draw.uniform(*np.log(BEAT_TEMPI))) * np.exp(drift)
    return draw.uniform(0.05, 0.4) + np.append(0.0, period[:-1].cumsum())


def play(
    tune: Tune, sound: Sequence, until: float, clock: Clock, draw: Rng, drums: bool = False
) -> list[Note]:
    """Repeat `tune` with accompaniment up to `until` crotchets.

    sound: one of STYLES, programs of melody and chords. clock: converts crotchets to seconds.
    """
    style, lead, backing = sound
    loudness, notes = int(draw.integers(75, 115)), []

    def add(at: float, duration: float, pitch: int, softer: int, program: int) -> None:
        if at < until:
            # timing and loudness vary as in a live performance
            offset = draw.normal(0, 0.006)
            start, stop = clock(at) + offset, clock(at + 0.92 * duration) + offset
            velocity = int(np.clip(loudness - softer + draw.integers(-8, 9), 1, 127))
            notes.append(Note(max(start, 0.0), max(stop, start + 0.03), pitch, velocity, program))

    chords = harmony(tune)
    for repeat in range(int(until / (tune.bars * tune.bar)) + 1):
        begin = repeat * tune.bars * tune.bar
        for at, duration, pitch in tune.notes:
            add(begin + at, duration, pitch, 0, lead)
        for i, chord in enumerate(chords):
            for at, duration, pitch in _backing(style, chord, tune):
                add(begin + i * tune.bar + at, duration, pitch, 20, backing)
            for at, drum in _drums(tune) if drums else ():
                add(begin + i * tune.bar + at, 0.2, drum, 10, DRUMS)
    return notes


def _backing(style: str, chord: tuple[int, ...], tune: Tune) -> list[tuple[float, float, int]]:
    """Return one bar: (onset, length) in crotchets and MIDI pitch."""
    root = BASS + (chord[0] - BASS) % 12
    middle = sorted(MIDDLE + (x - MIDDLE) % 12 for x in chord)
    if style == "alone":
        return []
    if style == "block":
        return [(0.0, tune.bar, pitch) for pitch in (root, *middle)]
    if style == "broken":
        step = tune.beat / (3 if tune.beat == 1.5 else 2)
        order = itertools.cycle((middle[0], middle[2], middle[1], middle[2]))
        steps = range(round(tune.bar / step))
        return [(0.0, tune.bar, root)] + [(i * step, step, next(order)) for i in steps]
    after = [i * tune.beat for i in range(1, tune.beats)] if tune.beats > 2 else [tune.bar / 2]
    return [(0.0, tune.beat, root)] + [(at, tune.beat / 2, p) for at in after for p in middle]


def _drums(tune: Tune) -> list[tuple[float, int]]:
    strokes = []
    for beat in range(tune.beats):
        at = beat * tune.beat
        strokes += [(at, HAT), (at + tune.beat * (2 / 3 if tune.beat == 1.5 else 1 / 2), HAT)]
        strokes.append((at, KICK if beat == 0 or (beat == 2 and tune.beats == 4) else SNARE))
    return strokes
