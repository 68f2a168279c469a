"""Dataset of real drum strokes from Hydrogen's drum kits, with kits held out for val and test."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.synthetic.dataset import SPLITS, Clip, NotInstalled, Recipe, rng, vary_level

SECONDS = 1.5
FOLDER = "/usr/share/hydrogen/data/drumkits"
# patterns for a kit's instrument names; the first match counts, None leaves the instrument out
PATTERNS = (
    (None, r"roll|free|side|dirty|ring \d|hat low|redo|empty"),
    ("kick", r"kick|bass ?drum"),
    ("cowbell", r"cowbell|(sangban|kenkeni|dununba)\d* bell"),
    ("ride", r"ride"),
    ("crash", r"crash|cymbal"),
    ("clap", r"clap"),
    ("open hat", r"(hh|hat).*\bop|open"),
    ("closed hat", r"(hh|hat).*\b(cl|pd|pedal)|(closed|pedal) hh"),
    ("snare", r"snare"),
    ("tom", r"\btom"),
    ("hand drum", r"bongo|conga|djembe"),
)
LABELS = tuple(sorted(label for label, _ in PATTERNS if label))
KITS_BY_LICENCE = {  # from Debian's package hydrogen-drumkits
    "CC0": ["Audiophob"],
    "CC-BY-3.0": ["rumpf_kit_z01_h2"],
    "CC-BY-SA-3.0": ["circAfrique v4"],
    "CC-BY-SA-3.0-US": ["BJA_Pacific"],
    "GPL-2": ["Gimme A Hand 1.0", "Millo-Drums_v.1", "Millo_MultiLayered2", "Millo_MultiLayered3"],
    "GPL-2+": ["ElectricEmpireKit", "HardElectro1", "VariBreaks"],
    "GPL-2+ with composition exception": ["ColomboAcousticDrumkit"],
}
LICENCES = {kit: licence for licence, kits in KITS_BY_LICENCE.items() for kit in kits}
TEST_KITS = ("Audiophob", "BJA_Pacific", "Gimme A Hand 1.0")
VAL_KITS = ("ColomboAcousticDrumkit", "VariBreaks")
UNUSED_KITS = ("ForzeeStereo", "The Black Pearl 1.0")


class Stroke(NamedTuple):
    """A recording: its label, its kit, the kit's name for the instrument, and the file."""

    label: str
    kit: str
    name: str
    path: Path


def drums(folder: str = "", small: bool = False) -> Recipe:
    """Single strokes with 10 kinds of drum as classes.

    Raises NotInstalled without Debian's kits, UserError for a given `folder` without them.
    """
    # the kits of Debian name a file that the package lacks
    named = _strokes(folder)
    strokes = [stroke for stroke in named if stroke.path.exists()]
    clips = [_clip(stroke) for stroke in strokes]
    if small:
        clips = list({(clip.split, clip.label): clip for clip in clips}.values())
    kits = {split: {} for split in SPLITS}
    for kit in sorted({stroke.kit for stroke in strokes}):
        kits[_split_of(kit)][kit] = LICENCES.get(kit, "not known")
    missing = {f"{x.kit}/{x.path.name}": "no such file" for x in named if x not in strokes}
    source = "one-shots of Hydrogen's drum kits (Debian: hydrogen-drumkits)"
    return Recipe(clips, dict(source=source, split="by kit", kits=kits, left_out=missing))


def label_of(name: str) -> str | None:
    """Return the class of a kit's instrument by its name, None if it belongs to none."""
    return next((label for label, x in PATTERNS if re.search(x, name.lower())), None)


def _split_of(kit: str) -> str:
    return "test" if kit in TEST_KITS else "val" if kit in VAL_KITS else "train"


def _strokes(folder: str) -> list[Stroke]:
    """Return each recording that the kits in `folder` (FOLDER if empty) name, if it has a class."""
    kits = [x.parent for x in sorted(Path(folder or FOLDER).glob("*/drumkit.xml"))]
    kits = [kit for kit in kits if kit.name not in UNUSED_KITS]
    if not folder and not kits:
        raise NotInstalled(
            f"no drum kits in {FOLDER}: apt-get install hydrogen-drumkits, or give --drumkits=DIR"
        )
    strokes = {stroke.path: stroke for kit in kits for stroke in _strokes_of(kit)}
    missing = sorted(set(TEST_KITS + VAL_KITS) - {stroke.kit for stroke in strokes.values()})
    if missing:
        raise UserError(
            f"{folder or FOLDER} lacks the drum kits {', '.join(missing)}, which are held out; "
            "give --drumkits the folder of Debian's hydrogen-drumkits"
        )
    return list(strokes.values())


def _strokes_of(kit: Path) -> Iterator[Stroke]:
    for instrument in ElementTree.parse(kit / "drumkit.xml").iterfind(".//{*}instrument"):
        name = instrument.findtext("{*}name", "")
        if label := label_of(name):
            for file in instrument.iterfind(".//{*}filename"):
                if file.text:
                    yield Stroke(label, kit.name, name, kit / file.text)


def _clip(stroke: Stroke) -> Clip:
    def wave() -> np.ndarray:
        draw = rng("made_drums", stroke.kit, stroke.path.name)
        audio, sample_rate = soundfile.read(stroke.path, dtype="float32", always_2d=True)
        mono = soxr.resample(audio.mean(axis=1), sample_rate, SAMPLE_RATE)
        loud = np.abs(mono) > 0.02 * np.abs(mono).max()
        mono = mono[max(0, int(loud.argmax()) - SAMPLE_RATE // 200) :]
        padded = np.zeros(round(SECONDS * SAMPLE_RATE), np.float32)
        start = int(draw.uniform(0, 0.1) * SAMPLE_RATE)
        mono = mono[: len(padded) - start]
        fade = min(len(mono), SAMPLE_RATE // 50)
        mono[len(mono) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
        padded[start : start + len(mono)] = mono
        return vary_level(padded, draw)

    made_of = {"kit": stroke.kit, "name": stroke.name, "file": stroke.path.name}
    return Clip(_split_of(stroke.kit), stroke.label, made_of, wave)
