"""The instruments of General MIDI that single notes are taken of, with their usual ranges."""

import re
from typing import NamedTuple


class Instrument(NamedTuple):
    """A program 0 to 127 and the lowest and highest MIDI pitch a player would play on it."""

    name: str
    program: int
    low: int
    high: int

    @property
    def pitches(self) -> range:
        return range(self.low, self.high + 1)


# Of programs that are one instrument in two flavours, or that every font fills differently (synth
# effects), one or none is here: which of them sounds, nobody could tell on a font not heard before.
# No alto sax: TimGM6mb is silent at pitch 64 of it.
INSTRUMENTS = tuple(
    Instrument(*fields)
    for fields in (
        ("acoustic grand piano", 0, 30, 96),
        ("electric piano", 4, 36, 91),
        ("harpsichord", 6, 36, 86),
        ("clavinet", 7, 36, 91),
        ("celesta", 8, 60, 96),
        ("glockenspiel", 9, 72, 101),
        ("vibraphone", 11, 53, 89),
        ("marimba", 12, 45, 91),
        ("xylophone", 13, 65, 96),
        ("tubular bells", 14, 55, 79),
        ("drawbar organ", 16, 36, 91),
        ("church organ", 19, 36, 91),
        ("accordion", 21, 48, 89),
        ("harmonica", 22, 55, 89),
        ("acoustic guitar (nylon)", 24, 40, 84),
        ("acoustic guitar (steel)", 25, 40, 84),
        ("electric guitar (clean)", 27, 40, 84),
        ("electric guitar (muted)", 28, 40, 79),
        ("overdriven guitar", 29, 40, 84),
        ("distortion guitar", 30, 40, 84),
        ("acoustic bass", 32, 28, 55),
        ("electric bass (finger)", 33, 28, 57),
        ("fretless bass", 35, 28, 57),
        ("slap bass", 36, 28, 57),
        ("synth bass", 38, 28, 57),
        ("violin", 40, 55, 93),
        ("viola", 41, 48, 81),
        ("cello", 42, 36, 72),
        ("contrabass", 43, 28, 55),
        ("tremolo strings", 44, 40, 86),
        ("pizzicato strings", 45, 40, 86),
        ("orchestral harp", 46, 30, 91),
        ("timpani", 47, 36, 60),
        ("string ensemble", 48, 40, 88),
        ("choir aahs", 52, 48, 79),
        ("trumpet", 56, 55, 84),
        ("trombone", 57, 40, 70),
        ("tuba", 58, 28, 57),
        ("muted trumpet", 59, 55, 84),
        ("french horn", 60, 40, 76),
        ("brass section", 61, 40, 82),
        ("soprano sax", 64, 56, 86),
        ("tenor sax", 66, 44, 75),
        ("baritone sax", 67, 36, 69),
        ("oboe", 68, 58, 89),
        ("english horn", 69, 52, 81),
        ("bassoon", 70, 34, 70),
        ("clarinet", 71, 50, 88),
        ("piccolo", 72, 74, 100),
        ("flute", 73, 60, 96),
        ("recorder", 74, 60, 91),
        ("pan flute", 75, 60, 93),
        ("ocarina", 79, 60, 88),
        ("banjo", 105, 48, 84),
        ("kalimba", 108, 55, 84),
    )
)
# Those whose note sounds at the pitch MIDI says, in both usual fonts: no bells, no organ stops.
_UNSURE = {"celesta", "glockenspiel", "tubular bells", "timpani", "xylophone", "kalimba"}
_STOPS = {"drawbar organ", "church organ", "accordion", "tremolo strings", "brass section"}
PITCHED = tuple(x for x in INSTRUMENTS if x.name not in _UNSURE | _STOPS)
# Those a listener would tell from each other by one note.
_DISTINCT = """acoustic grand piano; electric piano; harpsichord; glockenspiel; vibraphone; marimba;
tubular bells; church organ; accordion; harmonica; acoustic guitar (nylon);
electric guitar (muted); distortion guitar; electric bass (finger); violin; cello;
pizzicato strings; orchestral harp; timpani; string ensemble; choir aahs; trumpet; trombone; tuba;
french horn; tenor sax; oboe; bassoon; clarinet; flute; recorder; banjo"""
DISTINCT = tuple(x for x in INSTRUMENTS if x.name in re.split(r";\s+", _DISTINCT))
