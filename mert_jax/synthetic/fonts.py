"""Soundfonts: notes to sound, by TinySoundFont (https://github.com/schellingb/TinySoundFont)."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import soxr

from mert_jax.errors import UserError
from mert_jax.synthetic.recipe import SAMPLE_RATE

DRUMS = 128  # as a program: the font's drum kit
RENDER_RATE = 48_000  # the renderer interpolates samples without a filter: above, then down
DRUM_CHANNEL = 9
RENDERER = "0.3.7"
TRAIN_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
LICENCES = {"FluidR3_GM": "MIT", "TimGM6mb": "GPL-2"}
INSTALL = {
    "renderer": f"pip install --no-deps tinysoundfont=={RENDERER}",
    "train": "apt-get install fluid-soundfont-gm",
    "test": "pip install 'mert_jax[make_tasks]'",
}


class Missing(UserError):
    """Something that a task is made of is not installed: what, and the command that brings it."""


class Note(NamedTuple):
    """A note from `start` to `stop` [seconds]; pitch and velocity as in MIDI; program 0 to 127 of
    General MIDI, or DRUMS."""

    start: float
    stop: float
    pitch: int
    velocity: int
    program: int


class Font(NamedTuple):
    """Something that plays: (notes, seconds, tuning in semitones) -> f32[N] at SAMPLE_RATE.

    about: what about.json says of it.
    """

    name: str
    play: Callable[..., np.ndarray]
    about: dict[str, Any]


class Fonts(NamedTuple):
    """One font that is trained on (and validated), and one that is heard in the test alone."""

    train: Font
    test: Font

    def of(self, split: str) -> Font:
        return self.test if split == "test" else self.train


def pair(train: str, test: str) -> Fonts:
    """The fonts at two paths, "" for where they usually are. Raises Missing, and UserError for a
    path that was given and is not there."""
    return Fonts(
        load(_path("train", train, TRAIN_FONT)), load(_path("test", test, bundled() or "TimGM6mb"))
    )


def bundled() -> str | None:
    """The font that comes with pretty_midi, None without it."""
    found = importlib.util.find_spec("pretty_midi")
    if not found or not found.origin:
        return None
    path = os.path.join(os.path.dirname(found.origin), "TimGM6mb.sf2")
    return path if os.path.exists(path) else None


def _path(role: str, given: str, usual: str) -> str:
    if given and not os.path.isfile(given):
        raise UserError(f"--{role}_font={given} is no file; a soundfont (.sf2) is needed")
    if not given and not os.path.isfile(usual):
        raise Missing(f"no soundfont {usual}: {INSTALL[role]}, or give --{role}_font=FILE.sf2")
    return given or usual


@functools.cache
def load(path: str) -> Font:
    """Load a soundfont. Raises Missing without the renderer, UserError for what it cannot read."""
    try:
        import tinysoundfont
    except ImportError:
        raise Missing(f"no renderer of soundfonts: {INSTALL['renderer']}") from None
    synth = tinysoundfont.Synth(samplerate=RENDER_RATE)
    try:
        font = synth.sfload(path)
    except Exception as e:  # the binding raises plain exceptions of several kinds
        raise UserError(f"{path} cannot be read as a soundfont: {e}") from e
    name = os.path.splitext(os.path.basename(path))[0]
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    about = {
        "name": name,
        "sha256": digest,
        "licence": LICENCES.get(name, "not known"),
        "renderer": f"tinysoundfont {importlib.metadata.version('tinysoundfont')}",
    }
    return Font(name, functools.partial(_play, synth, font, name), about)


def _play(
    synth: Any, font: int, name: str, notes: Sequence[Note], seconds: float, tuning: float = 0.0
) -> np.ndarray:
    programs = sorted({note.program for note in notes} - {DRUMS})
    channels = [c for c in range(16) if c != DRUM_CHANNEL]
    channel = dict(zip(programs, channels, strict=False)) | {DRUMS: DRUM_CHANNEL}
    synth.sounds_off()
    synth.generate(RENDER_RATE // 10)  # voices of the clip before fade out here
    for program, c in channel.items():
        if program != DRUMS and synth.sfpreset_name(font, 0, program) is None:
            raise UserError(f"soundfont {name} has no program {program}; give a General MIDI font")
        drums = program == DRUMS
        synth.program_select(c, font, 128 if drums else 0, 0 if drums else program, drums)
        synth.set_tuning(c, 0.0 if drums else tuning)
    events = []  # (sample, is a start, ...): at one moment, what ends comes first
    for note in notes:
        c, start, stop = channel[note.program], _sample(note.start), _sample(note.stop)
        events.append((start, 1, c, note.pitch, note.velocity))
        events.append((max(stop, start + 1), 0, c, note.pitch, 0))
    parts, now, end = [], 0, _sample(seconds)
    for at, starts, c, pitch, velocity in sorted(events):
        if at >= end:
            break
        if at > now:
            parts.append(_generate(synth, at - now))
            now = at
        if starts:
            synth.noteon(c, pitch, velocity)
        else:
            synth.noteoff(c, pitch)
    parts.append(_generate(synth, end - now))
    wave = soxr.resample(np.concatenate(parts), RENDER_RATE, SAMPLE_RATE)
    if np.abs(wave).max() < 1e-5:
        raise UserError(f"soundfont {name} is silent where it should play {notes[0]}")
    return wave


def _sample(seconds: float) -> int:
    return round(seconds * RENDER_RATE)


def _generate(synth: Any, samples: int) -> np.ndarray:
    stereo = np.frombuffer(bytes(synth.generate(samples)), np.float32).reshape(-1, 2)
    return stereo.mean(axis=1)
