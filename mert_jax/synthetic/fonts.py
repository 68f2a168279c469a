"""Soundfonts: notes to audio with TinySoundFont (https://github.com/schellingb/TinySoundFont)."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr

from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.synthetic.dataset import Clip, NotInstalled, Recipe, Rng, vary_level

DRUMS = 128  # program number of a font's drum kit
KICK, SNARE, HAT = 36, 38, 42  # its MIDI pitches
DRUM_CHANNEL = 9
# the renderer interpolates its samples without a filter: render above SAMPLE_RATE, then resample
RENDER_RATE = 48_000
TRAIN_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
LICENCES = {"FluidR3_GM": "MIT", "TimGM6mb": "GPL-2"}
INSTALL = {
    "renderer": "pip install --no-deps tinysoundfont==0.3.7",
    "train": "apt-get install fluid-soundfont-gm",
    "test": "pip install 'mert_jax[make_tasks]'",
}


class Note(NamedTuple):
    """A note from `start` to `stop` [seconds]; program: 0 to 127 of General MIDI, or DRUMS."""

    start: float
    stop: float
    pitch: int
    velocity: int
    program: int


class Font(NamedTuple):
    """A soundfont; play: (notes, seconds, tuning in semitones) -> f32[N] at SAMPLE_RATE."""

    name: str
    play: Callable[..., np.ndarray]
    about: dict[str, Any]


class Fonts(NamedTuple):
    """The font of train and val, and another one for the test."""

    train: Font
    test: Font

    def clip(
        self,
        split: str,
        label: Any,
        made_of: dict[str, Any],
        draw: Rng,
        notes: Sequence[Note],
        seconds: float,
        tuning: float = 0.0,
        noise_db: tuple[float, float] = (40, 70),
    ) -> Clip:
        """Return a clip of `notes` in the font of `split`, its noise and level from `draw`."""
        font = self.test if split == "test" else self.train

        def wave() -> np.ndarray:
            return vary_level(font.play(notes, seconds, tuning), draw, noise_db)

        return Clip(split, label, {"font": font.name, **made_of}, wave)

    def recipe(self, clips: Sequence[Clip], source: str, split: str) -> Recipe:
        """Return a recipe; split: how train and val differ."""
        fonts = {role: font.about for role, font in self._asdict().items()}
        return Recipe(clips, dict(source=source, split=f"{split}; test: another font", fonts=fonts))


def load_fonts(train: str, test: str) -> Fonts:
    """Load the fonts at two paths, "" for the usual places. Raises NotInstalled without one."""
    fonts = []
    for role, path, usual in (("train", train, TRAIN_FONT), ("test", test, bundled_font())):
        if path and not os.path.isfile(path):
            raise UserError(f"--{role}_font={path} is not a file; a soundfont (.sf2) is needed")
        if not path and not os.path.isfile(usual):
            how = f"{INSTALL[role]}, or give --{role}_font=FILE.sf2"
            raise NotInstalled(f"no soundfont {usual}: {how}")
        fonts.append(load_font(path or usual))
    return Fonts(*fonts)


def bundled_font() -> str:
    """Return the path of the font that comes with pretty_midi, only its name without that."""
    spec = importlib.util.find_spec("pretty_midi")
    return os.path.join(os.path.dirname(spec.origin) if spec else "", "TimGM6mb.sf2")


@functools.cache
def load_font(path: str) -> Font:
    """Load a soundfont. Raises NotInstalled without the renderer, UserError for a bad file."""
    try:
        import tinysoundfont  # optional
    except ImportError:
        raise NotInstalled(f"no renderer of soundfonts: {INSTALL['renderer']}") from None
    synth = tinysoundfont.Synth(samplerate=RENDER_RATE)
    try:
        number = synth.sfload(path)
    except Exception as e:  # the binding raises plain exceptions of several kinds
        raise UserError(f"{path} cannot be read as a soundfont: {e}") from e
    name, digest = Path(path).stem, hashlib.sha256(Path(path).read_bytes()).hexdigest()
    renderer = f"tinysoundfont {importlib.metadata.version('tinysoundfont')}"
    licence = LICENCES.get(name, "not known")
    about = dict(name=name, sha256=digest, licence=licence, renderer=renderer)
    return Font(name, functools.partial(_play, synth, number, name), about)


def _play(
    synth: Any, font: int, name: str, notes: Sequence[Note], seconds: float, tuning: float
) -> np.ndarray:
    def generate(samples: int) -> np.ndarray:
        stereo = np.frombuffer(bytes(synth.generate(samples)), np.float32)
        return stereo.reshape(-1, 2).mean(axis=1)

    synth.sounds_off()
    generate(RENDER_RATE // 10)  # voices of the previous clip fade out here
    channels = {DRUMS: DRUM_CHANNEL}
    synth.program_select(DRUM_CHANNEL, font, 128, 0, True)
    for channel, program in enumerate(sorted({note.program for note in notes} - {DRUMS})):
        if synth.sfpreset_name(font, 0, program) is None:
            raise UserError(f"soundfont {name} has no program {program}; give a General MIDI font")
        synth.program_select(channel, font, 0, program, False)
        synth.set_tuning(channel, tuning)
        channels[program] = channel
    events = []  # (sample, is a start, ...): notes end before others start at the same sample
    for note in notes:
        start, stop = round(note.start * RENDER_RATE), round(note.stop * RENDER_RATE)
        key = channels[note.program], note.pitch
        events += [(start, True, *key, note.velocity), (max(stop, start + 1), False, *key)]
    parts, now, end = [], 0, round(seconds * RENDER_RATE)
    for at, starts, *key in sorted(event for event in events if event[0] < end):
        if at > now:
            parts.append(generate(at - now))
        now = at
        (synth.noteon if starts else synth.noteoff)(*key)
    wave = np.concatenate([*parts, generate(end - now)])
    wave = soxr.resample(wave, RENDER_RATE, SAMPLE_RATE)
    if np.abs(wave).max() < 1e-5:
        raise UserError(f"soundfont {name} is silent where it should play {notes[0]}")
    return wave
