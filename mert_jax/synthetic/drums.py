"""Drum types: real one-shots of Hydrogen's drum kits, whole kits left out for the test."""

import glob
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from mert_jax.errors import UserError
from mert_jax.synthetic.fonts import Missing
from mert_jax.synthetic.recipe import SAMPLE_RATE, Clip, Recipe, rng, vary

SECONDS = 1.5
FOLDER = "/usr/share/hydrogen/data/drumkits"
# what a kit calls its instrument; the first that is found counts, None leaves the instrument out
NAMES = (
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
LABELS = tuple(sorted(label for label, _ in NAMES if label))
LICENCES = {  # as Debian's package hydrogen-drumkits says
    "Audiophob": "CC0",
    "BJA_Pacific": "CC-BY-SA-3.0-US",
    "ColomboAcousticDrumkit": "GPL-2+ with composition exception",
    "ElectricEmpireKit": "GPL-2+",
    "Gimme A Hand 1.0": "GPL-2",
    "HardElectro1": "GPL-2+",
    "Millo-Drums_v.1": "GPL-2",
    "Millo_MultiLayered2": "GPL-2",
    "Millo_MultiLayered3": "GPL-2",
    "VariBreaks": "GPL-2+",
    "circAfrique v4": "CC-BY-SA-3.0",
    "rumpf_kit_z01_h2": "CC-BY-3.0",
}
TEST_KITS = ("Audiophob", "BJA_Pacific", "Gimme A Hand 1.0")
VAL_KITS = ("ColomboAcousticDrumkit", "VariBreaks")
# of these, nothing is used, in any split
NEVER = ("ForzeeStereo", "The Black Pearl 1.0")


class Shot(NamedTuple):
    """One recording: its label, its kit, what the kit calls it, and the file."""

    label: str
    kit: str
    name: str
    path: str


def drums(folder: str = "", small: bool = False) -> Recipe:
    """Which drum (10 classes), of single strokes. Raises Missing without the kits, and UserError
    for a folder that was given and holds none."""
    named = find(folder or FOLDER, given=bool(folder))
    shots = [shot for shot in named if os.path.exists(shot.path)]
    clips = [_clip(shot) for shot in shots]
    if small:
        clips = list({(clip.split, clip.label): clip for clip in clips}.values())
    kits = sorted({shot.kit for shot in shots})
    about = {
        "source": "one-shots of Hydrogen's drum kits (Debian: hydrogen-drumkits)",
        "split": "by kit",
        "kits": {
            split: {kit: LICENCES.get(kit, "not known") for kit in kits if split_of(kit) == split}
            for split in ("train", "val", "test")
        },
        # a kit of Debian's names a file that the package lacks
        "left_out": {
            f"{shot.kit}/{os.path.basename(shot.path)}": "no such file"
            for shot in named
            if shot not in shots
        },
    }
    return Recipe(clips, about)


def label_of(name: str) -> str | None:
    """The class of what a kit calls an instrument, None for what belongs to none."""
    for label, pattern in NAMES:
        if re.search(pattern, name.lower()):
            return label
    return None


def split_of(kit: str) -> str:
    return "test" if kit in TEST_KITS else "val" if kit in VAL_KITS else "train"


def find(folder: str, given: bool = True) -> list[Shot]:
    """Every recording with a class that the kits name, kit by kit, each once; there or not."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*", "drumkit.xml")))
    paths = [path for path in paths if os.path.basename(os.path.dirname(path)) not in NEVER]
    shots = {shot.path: shot for path in paths for shot in _shots(path)}
    missing = sorted(set(TEST_KITS + VAL_KITS) - {shot.kit for shot in shots.values()})
    if not given and not paths:
        raise Missing(
            f"no drum kits in {folder}: apt-get install hydrogen-drumkits, or give --drumkits=DIR"
        )
    if missing:
        raise UserError(
            f"{folder} lacks the drum kits {', '.join(missing)}, which are held out; the folder of "
            "Debian's hydrogen-drumkits is needed"
        )
    return list(shots.values())


def _shots(path: str) -> Iterator[Shot]:
    folder = os.path.dirname(path)
    tag = lambda x: x.tag.rpartition("}")[2]
    for instrument in ElementTree.parse(path).getroot().iter():
        if tag(instrument) != "instrument":
            continue
        name = next((x.text or "" for x in instrument if tag(x) == "name"), "")
        label = label_of(name)
        # a kit's own unused instruments are called by numbers, and some play "emptySample"
        files = [x.text for x in instrument.iter() if tag(x) == "filename" and x.text]
        for file in files if label else ():
            sample = os.path.join(folder, file)
            yield Shot(label, os.path.basename(folder), name, sample)


def _clip(shot: Shot) -> Clip:
    def wave() -> np.ndarray:
        draw = rng("made_drums", shot.kit, os.path.basename(shot.path))
        audio, sample_rate = soundfile.read(shot.path, dtype="float32", always_2d=True)
        mono = soxr.resample(audio.mean(axis=1), sample_rate, SAMPLE_RATE)
        loud = np.abs(mono) > 0.02 * np.abs(mono).max()
        mono = mono[max(0, int(loud.argmax()) - SAMPLE_RATE // 200) :]
        out = np.zeros(round(SECONDS * SAMPLE_RATE), np.float32)
        start = int(draw.uniform(0, 0.1) * SAMPLE_RATE)
        mono = mono[: len(out) - start]
        fade = min(len(mono), SAMPLE_RATE // 50)
        mono[len(mono) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
        out[start : start + len(mono)] = mono
        return vary(out, draw)

    made_of = {"kit": shot.kit, "name": shot.name, "file": os.path.basename(shot.path)}
    return Clip(split_of(shot.kit), shot.label, made_of, wave)
