"""Dataset of real drum strokes from Hydrogen's drum kits, with kits held out for val and test."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

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
LICENCES = {  # of the kits of Debian's package hydrogen-drumkits
    **{"Audiophob": "CC0", "rumpf_kit_z01_h2": "CC-BY-3.0", "circAfrique v4": "CC-BY-SA-3.0"},
    **{"BJA_Pacific": "CC-BY-SA-3.0-US", "Gimme A Hand 1.0": "GPL-2", "Millo-Drums_v.1": "GPL-2"},
    **{"Millo_MultiLayered2": "GPL-2", "Millo_MultiLayered3": "GPL-2", "VariBreaks": "GPL-2+"},
    **{"ElectricEmpireKit": "GPL-2+", "HardElectro1": "GPL-2+"},
    "ColomboAcousticDrumkit": "GPL-2+ with composition exception",
}
TEST_KITS = ("Audiophob", "BJA_Pacific", "Gimme A Hand 1.0")
VAL_KITS = ("ColomboAcousticDrumkit", "VariBreaks")
HELD_OUT = dict.fromkeys(TEST_KITS, "test") | dict.fromkeys(VAL_KITS, "val")
UNUSED_KITS = ("ForzeeStereo", "The Black Pearl 1.0")


def drums(folder: str = "", small: bool = False) -> Recipe:
    """Single strokes with 10 kinds of drum as classes. Raises NotInstalled without any kit."""
    kits = [x.parent for x in sorted(Path(folder or FOLDER).glob("*/drumkit.xml"))]
    kits = [kit for kit in kits if kit.name not in UNUSED_KITS]
    if not folder and not kits:
        how = "apt-get install hydrogen-drumkits, or give --drumkits=DIR"
        raise NotInstalled(f"no drum kits in {FOLDER}: {how}")
    clips, missing = {}, {}
    for kit in kits:
        for instrument in ElementTree.parse(kit / "drumkit.xml").iterfind(".//{*}instrument"):
            name = instrument.findtext("{*}name", "")
            files = [kit / x.text for x in instrument.iterfind(".//{*}filename") if x.text]
            for file in files if label_of(name) else ():
                if file.exists():
                    clips[file] = _clip(kit.name, name, file)
                else:  # Debian's kits name such a file
                    missing[f"{kit.name}/{file.name}"] = "no such file"
    by_split = {split: {} for split in SPLITS}
    for kit in sorted({clip.made_of["kit"] for clip in clips.values()}):
        by_split[HELD_OUT.get(kit, "train")][kit] = LICENCES.get(kit, "not known")
    if lacking := HELD_OUT.keys() - by_split["test"].keys() - by_split["val"].keys():
        lacks = f"{folder or FOLDER} lacks the drum kits {', '.join(sorted(lacking))}"
        raise UserError(f"{lacks}, which are held out; give --drumkits Debian's hydrogen-drumkits")
    if small:
        clips = {(clip.split, clip.label): clip for clip in clips.values()}
    source = "one-shots of Hydrogen's drum kits (Debian: hydrogen-drumkits)"
    about = dict(source=source, split="by kit", kits=by_split, left_out=missing)
    return Recipe(list(clips.values()), about)


def label_of(name: str) -> str | None:
    """Return the class of a kit's instrument by its name, None if it belongs to none."""
    return next((label for label, x in PATTERNS if re.search(x, name.lower())), None)


def _clip(kit: str, name: str, file: Path) -> Clip:
    def wave() -> np.ndarray:
        draw = rng("made_drums", kit, file.name)
        audio, sample_rate = soundfile.read(file, dtype="float32", always_2d=True)
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

    made_of = dict(kit=kit, name=name, file=file.name)
    return Clip(HELD_OUT.get(kit, "train"), label_of(name), made_of, wave)
