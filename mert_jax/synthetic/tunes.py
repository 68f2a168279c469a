"""Tunes of music21's corpus with the key and metre their ABC says, and chords put to them.

Irish, Scottish and American tunes of printed collections (O'Neill's, Ryan's Mammoth, Aird's, ...).
The Essen collection is left out: its ABC has keys by number of sharps, whatever the mode, and may
not be used commercially.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mert_jax.synthetic.fonts import Missing
from mert_jax.synthetic.recipe import rng

COLLECTIONS = ("airdsAirs", "miscFolk", "oneills1850", "ryansMammoth")
LICENCE = (
    "tunes: public domain (printed 1782 to 1903); encodings: redistributed by music21 with the "
    "permission of their transcribers, see its corpus/license.txt"
)
TONICS = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
TRIADS = {  # semitones over the tonic; first the tonic's own
    "major": ((0, 4, 7), (5, 9, 0), (7, 11, 2), (9, 0, 4), (2, 5, 9)),
    "minor": ((0, 3, 7), (5, 8, 0), (7, 11, 2), (8, 0, 3), (10, 2, 5)),
}
METRES = {  # beats a bar, and crotchets a beat
    "2/4": (2, 1.0),
    "3/4": (3, 1.0),
    "4/4": (4, 1.0),
    "C": (4, 1.0),
    "C|": (2, 2.0),
    "6/8": (2, 1.5),
    "9/8": (3, 1.5),
}
_KEY = re.compile(r"([A-G])([#b]?)\s*(m|min|minor|maj|major)?", re.IGNORECASE)


class Header(NamedTuple):
    """A tune before it is parsed. tonic: pitch class; metre: as ABC writes it."""

    collection: str
    title: str
    tonic: int
    mode: str
    metre: str
    text: str


class Tune(NamedTuple):
    """Whole bars of a melody, without the upbeat.

    notes: (onset and length in crotchets from the first bar, MIDI pitch); beats a bar, beat in
    crotchets; bars: how many.
    """

    header: Header
    notes: tuple[tuple[float, float, int], ...]
    beats: int
    beat: float
    bars: int


@functools.cache
def headers() -> tuple[Header, ...]:
    """Every tune in major or minor, the first of each title. Raises Missing without music21."""
    found = importlib.util.find_spec("music21")
    if not found or not found.origin:
        raise Missing("no music21, whose tunes are used: pip install 'mert_jax[make_tasks]'")
    corpus, by_title = os.path.join(os.path.dirname(found.origin), "corpus"), {}
    for collection in COLLECTIONS:
        folder = os.path.join(corpus, collection)
        for name in sorted(os.listdir(folder)):
            if name.endswith(".abc"):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as f:
                    for header in split(collection, f.read()):
                        # tunes are printed in several collections: one title, one tune
                        by_title.setdefault(_simple(header.title), header)
    return tuple(by_title.values())


def split(collection: str, text: str) -> Iterator[Header]:
    """The tunes of an ABC file that are said to be in major or minor, one key and metre in all."""
    for part in re.split(r"(?m)^(?=X:)", text):
        found = re.findall(r"(?m)^([TMK]):[ \t]*([^%\r\n]*?)[ \t]*(?:%.*)?\r?$", part)
        fields = dict(reversed(found))
        changes = [name for name, _ in found].count
        key = _KEY.fullmatch(fields.get("K", ""))
        if key and fields.get("T") and changes("K") == changes("M") == 1:
            tonic = "CDEFGAB".index(key[1].upper())
            tonic = (0, 2, 4, 5, 7, 9, 11)[tonic] + {"#": 1, "b": -1, "": 0}[key[2]]
            named = key[3] or ""
            minor = named == "m" or named.lower().startswith("mi")
            mode = "minor" if minor else "major"
            yield Header(collection, fields["T"], tonic % 12, mode, fields.get("M", ""), part)


def _simple(title: str) -> str:
    words = re.sub(r"[^a-z ]", "", title.lower().split(" -- ")[0]).split()
    return " ".join(sorted(word for word in words if word not in ("the", "a", "an", "or")))


def parse(header: Header) -> Tune | None:
    """The longest run of whole bars of a tune, None where there are fewer than four, where the
    metre is another than METRES', or where music21 cannot read it."""
    if header.metre not in METRES:
        return None
    from music21 import converter
    from music21.exceptions21 import Music21Exception

    beats, beat = METRES[header.metre]
    length = beats * beat
    # one voice, no grace notes, no chord symbols, no fingering: what is sung is the melody
    text = re.sub(r"\{[^}]*\}|\"[^\"]*\"", "", header.text)
    try:
        score = converter.parse(text, format="abc")
    except (Music21Exception, ValueError, IndexError, KeyError, AttributeError, TypeError):
        return None
    runs, run = [], []
    for measure in score.recurse().getElementsByClass("Measure"):
        notes = [
            (float(x.offset), float(x.quarterLength), x.pitches[-1].midi)
            for x in measure.flatten().notes
            if x.quarterLength > 0
        ]
        if abs(float(measure.duration.quarterLength) - length) < 1e-6 and notes:
            run.append(notes)
        else:
            runs, run = [*runs, run], []
    run = max([*runs, run], key=len)
    if len(run) < 4:
        return None
    notes = tuple((i * length + at, n, pitch) for i, bar in enumerate(run) for at, n, pitch in bar)
    return Tune(header, notes, beats, beat, len(run))


def is_sure(tune: Tune) -> bool:
    """Whether the melody agrees with the key it is said to be in: many a tune that is written in
    major or minor is mixolydian or dorian."""
    weight = [0.0] * 12
    for _, length, pitch in tune.notes:
        weight[(pitch - tune.header.tonic) % 12] += length
    total = sum(weight)
    mode = tune.header.mode
    inside = sum(weight[x] for x in SCALES[mode]) + (weight[11] if mode == "minor" else 0)
    tonic, *others = (sum(weight[x] for x in triad) for triad in TRIADS[mode])
    if mode == "major":
        modal = weight[10] > 0.25 * weight[11]
    else:
        modal = weight[9] > 0.5 * weight[8] or weight[8] == 0
    return inside >= 0.95 * total and tonic >= max(0.4 * total, *others) and not modal


@functools.cache
def sure(mode: str, count: int) -> tuple[Tune, ...]:
    """The first `count` tunes in `mode` (or as many as there are) of those that are sure of it, in
    a drawn order."""
    those = [header for header in headers() if header.mode == mode]
    found = []
    for i in rng("tunes", mode).permutation(len(those)):
        tune = parse(those[i])
        if tune and is_sure(tune):
            found.append(tune)
        if len(found) == count:
            break
    return tuple(found)


def divide(tunes: Sequence[Tune]) -> dict[str, list[Tune]]:
    """Tunes by split: no tune is in two."""
    first, second = round(0.55 * len(tunes)), round(0.7 * len(tunes))
    return {
        "train": list(tunes[:first]),
        "val": list(tunes[first:second]),
        "test": list(tunes[second:]),
    }


def harmony(tune: Tune) -> list[tuple[int, ...]]:
    """A triad (pitch classes, the root first) for each bar: the one most of it lies in."""
    length, found = tune.beats * tune.beat, []
    for bar in range(tune.bars):
        score = {}
        for rank, triad in enumerate(TRIADS[tune.header.mode]):
            chord = tuple((tune.header.tonic + x) % 12 for x in triad)
            inside = sum(
                n * (1.5 if at % length < 1e-6 else 1.0)
                for at, n, pitch in tune.notes
                if bar * length <= at < (bar + 1) * length and pitch % 12 in chord
            )
            score[chord] = inside - 0.1 * rank
        found.append(max(score, key=score.get))
    return found


def transpose(tune: Tune, semitones: int) -> Tune:
    """The tune `semitones` higher, key and notes."""
    header = tune.header._replace(tonic=(tune.header.tonic + semitones) % 12)
    notes = tuple((at, length, pitch + semitones) for at, length, pitch in tune.notes)
    return tune._replace(header=header, notes=notes)
