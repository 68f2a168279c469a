"""Folk tunes of music21's corpus, with the key and metre of their ABC text, and chords for them."""

import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mert_jax.synthetic.dataset import NotInstalled, Rng

# not Essen's, which gives keys by number of sharps and may not be used commercially
COLLECTIONS = ("airdsAirs", "miscFolk", "oneills1850", "ryansMammoth")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
TRIADS = {  # semitones above the tonic; the tonic's own triad first
    "major": ((0, 4, 7), (5, 9, 0), (7, 11, 2), (9, 0, 4), (2, 5, 9)),
    "minor": ((0, 3, 7), (5, 8, 0), (7, 11, 2), (8, 0, 3), (10, 2, 5)),
}
# beats a bar, crotchets a beat
METRES = {"2/4": (2, 1.0), "3/4": (3, 1.0), "4/4": (4, 1.0), "C": (4, 1.0), "C|": (2, 2.0)}
METRES |= {"6/8": (2, 1.5), "9/8": (3, 1.5)}


class Header(NamedTuple):
    """A tune before it is parsed. tonic: pitch class; metre: as written in ABC."""

    collection: str
    title: str
    tonic: int
    mode: str
    metre: str
    text: str


class Tune(NamedTuple):
    """Complete bars of a melody; notes: (onset and length in crotchets, MIDI pitch)."""

    header: Header
    notes: tuple[tuple[float, float, int], ...]
    beats: int  # of a bar
    beat: float  # in crotchets
    bars: int

    @property
    def bar(self) -> float:
        """Crotchets a bar."""
        return self.beats * self.beat


@functools.cache
def headers() -> tuple[Header, ...]:
    """Return the first tune of each title in major or minor. Raises NotInstalled."""
    spec = importlib.util.find_spec("music21")
    if not spec:
        raise NotInstalled("music21, the source of the tunes: pip install 'mert_jax[make_tasks]'")
    corpus, by_title = Path(spec.origin).parent / "corpus", {}
    for path in (path for name in COLLECTIONS for path in sorted((corpus / name).glob("*.abc"))):
        for header in parse_headers(path.parent.name, path.read_text("utf-8", errors="replace")):
            # a tune is printed in several collections, with its title in various spellings
            words = re.sub(r"[^a-z ]", "", header.title.lower().split(" -- ")[0]).split()
            title = sorted(word for word in words if word not in ("the", "a", "an", "or"))
            by_title.setdefault(tuple(title), header)
    return tuple(by_title.values())


def parse_headers(collection: str, text: str) -> Iterator[Header]:
    """Yield the tunes of an ABC file that have one metre and one key, in major or minor."""
    for part in re.split(r"(?m)^(?=X:)", text):
        pairs = re.findall(r"(?m)^([TMK]):[ \t]*([^%\r\n]*?)[ \t]*(?:%.*)?\r?$", part)
        fields, count = dict(reversed(pairs)), [name for name, _ in pairs].count
        key = re.fullmatch(r"(?i)([A-G])([#b]?)\s*(m|min|minor|maj|major)?", fields.get("K", ""))
        if key and fields.get("T") and count("K") == count("M") == 1:
            tonic = SCALES["major"]["CDEFGAB".index(key[1].upper())]
            tonic = (tonic + {"#": 1, "b": -1, "": 0}[key[2]]) % 12
            # "m" is minor, "M" major
            mode = "minor" if re.match(r"m$|(?i:mi)", key[3] or "") else "major"
            yield Header(collection, fields["T"], tonic, mode, fields["M"], part)


@functools.cache
def parse_tune(header: Header) -> Tune | None:
    """Return the longest run of complete bars, None for less than four or if music21 fails."""
    if header.metre not in METRES:
        return None
    from music21 import converter  # heavy
    from music21.exceptions21 import Music21Exception

    # drop grace notes, chord symbols and fingering
    text = re.sub(r"\{[^}]*\}|\"[^\"]*\"", "", header.text)
    try:
        score = converter.parse(text, format="abc")
    except (Music21Exception, ValueError, IndexError, KeyError, AttributeError, TypeError):
        return None
    beats, beat = METRES[header.metre]
    bars, longest = [], []
    for measure in score.recurse().getElementsByClass("Measure"):
        notes = [x for x in measure.flatten().notes if x.quarterLength > 0]
        complete = abs(float(measure.duration.quarterLength) - beats * beat) < 1e-6 and notes
        bars = [*bars, notes] if complete else []
        longest = max(longest, bars, key=len)
    notes = tuple(
        (i * beats * beat + float(x.offset), float(x.quarterLength), x.pitches[-1].midi)
        for i, bar in enumerate(longest)
        for x in bar
    )
    return Tune(header, notes, beats, beat, len(longest)) if len(longest) >= 4 else None


def shuffled_tunes(headers: Sequence[Header], draw: Rng) -> Iterator[Tune]:
    """Yield those tunes of `headers` that can be parsed, in a random order."""
    return filter(None, (parse_tune(headers[i]) for i in draw.permutation(len(headers))))


def agrees_with_key(tune: Tune) -> bool:
    """Return True if a melody is in its nominal mode; some are mixolydian or dorian instead."""
    weight = [0.0] * 12  # crotchets of each pitch class above the tonic
    for _, length, pitch in tune.notes:
        weight[(pitch - tune.header.tonic) % 12] += length
    mode = tune.header.mode
    inside = sum(weight[x] for x in SCALES[mode]) + (weight[11] if mode == "minor" else 0)
    tonic, *others = (sum(weight[x] for x in triad) for triad in TRIADS[mode])
    if mode == "major":
        modal = weight[10] > 0.25 * weight[11]
    else:
        modal = weight[9] > 0.5 * weight[8] or weight[8] == 0
    total = sum(weight)
    return inside >= 0.95 * total and tonic >= max(0.4 * total, *others) and not modal


def harmony(tune: Tune) -> list[tuple[int, ...]]:
    """Return the triad (pitch classes, root first) of each bar that most of the bar lies in."""
    mode, tonic = tune.header.mode, tune.header.tonic
    triads, chords = [tuple((tonic + x) % 12 for x in triad) for triad in TRIADS[mode]], []
    for bar in range(tune.bars):
        weights = [
            (n * (1.5 if at % tune.bar < 1e-6 else 1.0), pitch % 12)
            for at, n, pitch in tune.notes
            if bar * tune.bar <= at < (bar + 1) * tune.bar
        ]
        scores = [sum(n for n, x in weights if x in triad) for triad in triads]
        best = max(range(len(triads)), key=lambda rank: scores[rank] - 0.1 * rank)
        chords.append(triads[best])
    return chords
