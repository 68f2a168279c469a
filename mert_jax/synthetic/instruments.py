"""Datasets played on General MIDI instruments: single notes, playing techniques and mixes."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mert_jax.synthetic.dataset import SPLITS, Clip, Recipe, Rng, numbered, rng
from mert_jax.synthetic.fonts import DRUMS, HAT, KICK, SNARE, Fonts, Note


class Instrument(NamedTuple):
    """An instrument, its programs in General MIDI and the pitches that a player would play."""

    name: str
    programs: list[int]
    pitches: range
    marks: str


def _instruments(table: str) -> tuple[Instrument, ...]:
    """Parse "NAME PROGRAM[,PROGRAM] LOWEST-HIGHEST[MARKS]; ..."."""
    instruments = []
    for row in re.findall(r"([^;\s].*?) ([\d,]+) (\d+)-(\d+)([*~]*)", table):
        name, programs, low, high, marks = row
        programs, pitches = [int(x) for x in programs.split(",")], range(int(low), int(high) + 1)
        instruments.append(Instrument(name, programs, pitches, marks))
    return tuple(instruments)


# * can be told apart by a single note; ~ may not sound at its MIDI pitch (bells, organ stops).
# Programs that differ only in flavour, or from font to font (synth effects), are left out, as is
# the alto sax, whose pitch 64 is silent in TimGM6mb.
INSTRUMENTS = _instruments("""
acoustic grand piano 0 30-96*; electric piano 4 36-91*; harpsichord 6 36-86*; clavinet 7 36-91;
celesta 8 60-96~; glockenspiel 9 72-101*~; vibraphone 11 53-89*; marimba 12 45-91*;
xylophone 13 65-96~; tubular bells 14 55-79*~; drawbar organ 16 36-91~; church organ 19 36-91*~;
accordion 21 48-89*~; harmonica 22 55-89*; acoustic guitar (nylon) 24 40-84*;
acoustic guitar (steel) 25 40-84; electric guitar (clean) 27 40-84;
electric guitar (muted) 28 40-79*; overdriven guitar 29 40-84; distortion guitar 30 40-84*;
acoustic bass 32 28-55; electric bass (finger) 33 28-57*; fretless bass 35 28-57;
slap bass 36 28-57; synth bass 38 28-57; violin 40 55-93*; viola 41 48-81; cello 42 36-72*;
contrabass 43 28-55; tremolo strings 44 40-86~; pizzicato strings 45 40-86*;
orchestral harp 46 30-91*; timpani 47 36-60*~; string ensemble 48 40-88*; choir aahs 52 48-79*;
trumpet 56 55-84*; trombone 57 40-70*; tuba 58 28-57*; muted trumpet 59 55-84;
french horn 60 40-76*; brass section 61 40-82~; soprano sax 64 56-86; tenor sax 66 44-75*;
baritone sax 67 36-69; oboe 68 58-89*; english horn 69 52-81; bassoon 70 34-70*; clarinet 71 50-88*;
piccolo 72 74-100; flute 73 60-96*; recorder 74 60-91*; pan flute 75 60-93; ocarina 79 60-88;
banjo 105 48-84*; kalimba 108 55-84~""")
PITCHED = tuple(x for x in INSTRUMENTS if "~" not in x.marks)
DISTINCT = tuple(x for x in INSTRUMENTS if "*" in x.marks)
TECHNIQUES = _instruments("""
guitar: clean 27 43-71; guitar: muted 28 43-71; guitar: overdriven 29 43-71;
guitar: distorted 30 43-71; guitar: harmonics 31 43-71; bass: acoustic 32 28-52;
bass: finger 33 28-52; bass: pick 34 28-52; bass: fretless 35 28-52; bass: slap 36,37 28-52;
strings: bowed 48 48-79; strings: tremolo 44 48-79; strings: pizzicato 45 48-79;
trumpet: open 56 56-80; trumpet: muted 59 56-80""")
MIXED = _instruments(f"""
piano 0,1 45-84; electric piano 4,5 45-84; vibraphone 11 55-86; organ 16,19 45-84;
accordion 21 53-84; acoustic guitar 24,25 42-76; distorted guitar 29,30 40-72; bass 32,33 28-48;
violin 40 57-88; string ensemble 48 45-84; choir 52 48-76; trumpet 56 56-80; saxophone 64,66 56-75;
flute 73 62-91; drums {DRUMS} 0-0""")
MONOPHONIC = ("bass", "violin", "trumpet", "saxophone", "flute")  # in mixes, a line each
TRIADS = ((0, 4, 7), (2, 5, 9), (4, 7, 11), (5, 9, 0), (7, 11, 2), (9, 0, 4))  # of a major key

NOTE_SECONDS, TECHNIQUE_SECONDS, MIX_SECONDS = 2.0, 2.5, 4.0
PITCHES = range(36, 92)  # C2 to G6: at least ten instruments play each
PITCH_LABELS = tuple(map(str, PITCHES))
INSTRUMENT_LABELS, TECHNIQUE_LABELS, MIX_LABELS = (
    tuple(instrument.name for instrument in table) for table in (DISTINCT, TECHNIQUES, MIXED)
)
# clips of train, val and test: of each pitch, instrument and technique, and of all mixes
PITCH_CLIPS, INSTRUMENT_CLIPS, TECHNIQUE_CLIPS = (10, 4, 6), (32, 6, 8), (50, 12, 16)
MIX_CLIPS = (700, 150, 250)
SMALL, MIX_SMALL = (2, 1, 1), (8, 4, 4)


def pitch(fonts: Fonts, small: bool = False) -> Recipe:
    """Single notes with 56 MIDI pitches as classes; val has other instruments than train."""
    numbers, counts = (PITCHES[::8], SMALL) if small else (PITCHES, PITCH_CLIPS)
    notes = {str(n): [(player, n) for player in PITCHED if n in player.pitches] for n in numbers}
    # long notes in tune would be too easy: a linear head on a CQT has an accuracy of 0.99
    return _notes(fonts, "made_pitch", notes, counts, (0.08, 0.5), 0.4, noise_db=(6, 30))


def instrument(fonts: Fonts, small: bool = False) -> Recipe:
    """Single notes with 32 instruments as classes; val has other pitches of each than train."""
    players, counts = (DISTINCT[::8], SMALL) if small else (DISTINCT, INSTRUMENT_CLIPS)
    notes = {player.name: [(player, pitch) for pitch in player.pitches] for player in players}
    return _notes(fonts, "made_instrument", notes, counts, (0.4, 1.6), 0.2, noise_db=(40, 70))


def _notes(
    fonts: Fonts,
    task: str,
    notes: dict[str, list[tuple[Instrument, int]]],
    counts: Sequence[int],
    length: tuple[float, float],
    tuning: float,
    noise_db: tuple[float, float],
) -> Recipe:
    """Return single `notes` of each label: a fifth for val, the others for train, all for test."""
    clips = []
    for label, pairs in notes.items():
        order = [pairs[i] for i in rng(task, label).permutation(len(pairs))]
        fifth = len(pairs) // 5
        by_split = {"train": order[fifth:], "val": order[:fifth], "test": order}
        for split, i in numbered(*counts):
            player, pitch = by_split[split][i % len(by_split[split])]
            draw = rng(task, label, split, i)
            start = draw.uniform(0, 0.3)
            stop = start + draw.uniform(*length)
            note = Note(start, stop, pitch, int(draw.integers(50, 120)), player.programs[0])
            audio = [note], NOTE_SECONDS, draw.uniform(-tuning, tuning), noise_db
            made_of = {"instrument": player.name, "pitch": pitch}
            clips.append(fonts.clip(split, label, made_of, draw, *audio))
    source = "single notes of General MIDI instruments, rendered"
    return fonts.recipe(clips, source, "train and val: other notes of one font")


def technique(fonts: Fonts, small: bool = False) -> Recipe:
    """Phrases of one to four notes with 15 techniques as classes, which pitch does not predict."""
    counts = numbered(*(SMALL if small else TECHNIQUE_CLIPS))
    clips = [_phrase(fonts, *x, player) for player, x in itertools.product(TECHNIQUES, counts)]
    source = "short phrases in General MIDI articulations, rendered"
    return fonts.recipe(clips, source, "train and val: other phrases of one font")


def _phrase(fonts: Fonts, split: str, i: int, player: Instrument) -> Clip:
    draw = rng("made_technique", player.name, split, i)
    low, high = player.pitches[0], player.pitches[-1]
    program = player.programs[i % len(player.programs)]
    count = int(draw.integers(1, 5))
    starts = draw.uniform(0, 0.2) + np.arange(count) * draw.uniform(0.3, 0.5)
    pitches = draw.integers(low, high + 1) + np.append(0, draw.integers(-5, 6, count - 1)).cumsum()
    pitches = np.clip(pitches, low, high).tolist()
    legato = draw.uniform(0.5, 1.0)  # sounding part of the time to the next note
    notes = []
    for k, start in enumerate(starts.tolist()):
        stop = starts[k + 1] if k + 1 < count else start + draw.uniform(0.4, 1.2)
        stop = float(start + legato * (stop - start))
        notes.append(Note(start, stop, pitches[k], int(draw.integers(60, 120)), program))
    made_of, tuning = {"program": program, "pitches": pitches}, draw.uniform(-0.2, 0.2)
    return fonts.clip(split, player.name, made_of, draw, notes, TECHNIQUE_SECONDS, tuning)


def mix(fonts: Fonts, small: bool = False) -> Recipe:
    """Mixes of two to four instruments, with 15 as tags, that play the same random chords."""
    clips = []
    for split, count in zip(SPLITS, MIX_SMALL if small else MIX_CLIPS, strict=True):
        draw, used = rng("made_mix", split), np.zeros(len(MIXED))
        for i in range(count):
            size = draw.integers(2, 5)
            # prefer rare instruments; the noise avoids fixed pairs
            chosen = np.argsort(used + draw.uniform(0, 6, len(MIXED)))[:size]
            used[chosen] += 1
            clips.append(_mix_clip(fonts, split, i, sorted(MIXED[k] for k in chosen)))
    source = "drawn parts over drawn chords, General MIDI instruments, rendered"
    return fonts.recipe(clips, source, "train and val: other mixes of one font")


def _mix_clip(fonts: Fonts, split: str, i: int, players: Sequence[Instrument]) -> Clip:
    draw = rng("made_mix", split, i)
    beat = 60 / draw.uniform(80, 150)
    key = int(draw.integers(12))
    chords = draw.integers(len(TRIADS), size=int(MIX_SECONDS / beat / 2) + 1)
    chords = [[(key + x) % 12 for x in TRIADS[k]] for k in chords]
    notes, programs = [], []
    for player in players:
        program = player.programs[draw.integers(len(player.programs))]
        programs.append(program)
        loudness = int(draw.integers(70, 115))
        if program == DRUMS:
            notes += _drums(beat, loudness, draw)
            continue
        style = draw.choice(["line"] if player.name in MONOPHONIC else ["block", "broken", "line"])
        for start, length, pitch in _part(style, player.pitches, chords, beat, draw):
            velocity = int(np.clip(loudness + draw.integers(-10, 11), 1, 127))
            notes.append(Note(start, start + 0.95 * length, pitch, velocity, program))
    names, made_of = [player.name for player in players], {"programs": programs}
    return fonts.clip(split, names, made_of, draw, notes, MIX_SECONDS)


def _part(
    style: str, pitches: range, chords: list[list[int]], beat: float, draw: Rng
) -> Iterator[tuple[float, float, int]]:
    """Yield start and length [seconds] and pitch of notes: two beats of each chord."""
    at = int(draw.integers(pitches.start, pitches.stop))
    for k, chord in enumerate(chords):
        start = 2 * k * beat
        near = sorted((p for p in pitches if p % 12 in chord), key=lambda p: (abs(p - at), p))
        if style == "block":
            yield from ((start, 2 * beat, p) for p in near[:3])
        elif style == "broken":
            chosen = sorted(near[:4])
            yield from ((start + j * beat / 2, beat / 2, chosen[j % len(chosen)]) for j in range(4))
        else:
            length = beat if draw.uniform() < 0.5 else beat / 2
            picks = draw.integers(0, min(4, len(near)), round(2 * beat / length))
            yield from ((start + j * length, length, near[p]) for j, p in enumerate(picks))
            at = near[picks[-1]]


def _drums(beat: float, loudness: int, draw: Rng) -> list[Note]:
    notes = []
    for half in range(int(2 * MIX_SECONDS / beat) + 1):
        strokes = [HAT] if half % 2 else [HAT, SNARE if half % 4 else KICK]
        if half % 2 and draw.uniform() < 0.2:
            strokes.append(KICK)
        start = half * beat / 2
        notes += [Note(start, start + 0.1, stroke, loudness, DRUMS) for stroke in strokes]
    return notes
