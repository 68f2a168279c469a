"""Tiny data sets in the layouts that the tasks read: sines, noises and clicks."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

RATE = 24_000
SUFFIXES = {"train": "train", "valid": "val", "test": "test"}
COUNTS = {"train": 16, "valid": 8, "test": 8}
# museval, which scores MUSDB18, is not imported without
with_ffmpeg = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="no ffmpeg and ffprobe here"
)


def sine(frequency: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A sine with a little noise, f32[N]."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * (frequency * time + rng.random()))
    return (wave + 0.01 * rng.standard_normal(len(wave))).astype(np.float32)


def clicks(times: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Short bursts of noise at `times` in silence, f32[N]."""
    wave = 1e-4 * rng.standard_normal(round(seconds * RATE))
    for time in times:
        at = round(time * RATE)
        burst = wave[at : at + 480]
        burst += 0.5 * rng.standard_normal(len(burst)) * np.linspace(1, 0, len(burst))
    return wave.astype(np.float32)


def save(path: pathlib.Path, wave: np.ndarray, rate: int = RATE) -> dict:
    """Write a wav file, and give what a table says of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)
    return dict(duration=len(wave) / rate, sample_rate=rate, num_samples=len(wave), channels=1)


def table(
    root: pathlib.Path,
    name: str,
    folder: str,
    make: Callable[[int, str, np.random.Generator], dict],
) -> str:
    """Tables NAME.SPLIT.jsonl in MARBLE's layout; `make` gives wave, label and file name of each
    row, and other columns."""
    rng = np.random.default_rng(0)
    for split, suffix in SUFFIXES.items():
        rows = []
        for i in range(COUNTS[split]):
            row = make(i, split, rng)
            row |= save(root / row["audio"], row.pop("wave"))
            rows.append(row | {"audio_path": f"data/{folder}/{row.pop('audio')}"})
        root.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{name}.{suffix}.jsonl").write_text(text)
    return str(root)


def gtzan_genre(root: pathlib.Path) -> str:
    def make(i, split, rng):
        genre, frequency = (("blues", 220.0), ("metal", 1760.0))[i % 2]
        path = f"genres/{genre}/{split}{i}.wav"
        return dict(wave=sine(frequency, 1.0, rng), label=genre, audio=path)

    return table(root, "GTZANGenre", "GTZAN", make)


def gs(root: pathlib.Path) -> str:
    def make(i, split, rng):
        key, frequency = (("C major", 262.0), ("A minor", 880.0))[i // 2 % 2]
        path = f"giantsteps_clips/wav/{split}{i // 2}-{i % 2}.wav"
        return dict(
            wave=sine(frequency, 1.0, rng), label=key, audio=path, ori_uid=f"{split}{i // 2}"
        )

    return table(root, "GS", "GS", make)


def emo(root: pathlib.Path) -> str:
    def make(i, split, rng):
        x = rng.uniform(-1, 1)
        wave = sine(440.0 * 2 ** (2 * x), 1.0, rng)
        return dict(wave=wave, label=[x, -x / 2], audio=f"emomusic/wav/{split}{i}.wav")

    return table(root, "EMO", "EMO", make)


def tagged(name: str, folder: str, tags: tuple[str, str]) -> Callable[[pathlib.Path], str]:
    def write(root: pathlib.Path) -> str:
        def make(i, split, rng):
            present = [tag for k, tag in enumerate(tags) if i >> k & 1]
            wave = 0.01 * rng.standard_normal(RATE).astype(np.float32)
            for tag in present:
                wave = wave + sine((300.0, 2400.0)[tags.index(tag)], 1.0, rng)
            return dict(wave=wave / 2, label=present, audio=f"audio/0/{split}{i}.wav")

        return table(root, name, folder, make)

    return write


def nsynth(root: pathlib.Path) -> str:
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        examples = {}
        for i in range(count):
            pitch, family = ((45, "bass"), (81, "flute"))[i % 2]
            name = f"{family}_{split}_{i:03d}-{pitch:03d}-100"
            frequency = 440.0 * 2 ** ((pitch - 69) / 12)
            save(root / f"nsynth-{split}" / "audio" / f"{name}.wav", sine(frequency, 0.5, rng))
            examples[name] = {"pitch": pitch, "instrument_family_str": family}
        (root / f"nsynth-{split}" / "examples.json").write_text(json.dumps(examples))
    return str(root)


def vocalset(root: pathlib.Path) -> str:
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        rows = []
        for i in range(count):
            technique, singer, frequency = (("belt", "f1", 300.0), ("trill", "m11", 1500.0))[i % 2]
            rows.append(f"{technique}/{singer}_scales_{split}{i}_{i:02d}.wav")
            save(root / "audio" / rows[-1], sine(frequency, 0.5, rng))
        for suffix in "st":
            (root / f"{split}_{suffix}.txt").write_text("".join(f"{row}\n" for row in rows))
    return str(root)


def gtzan_beats(root: pathlib.Path) -> str:
    def make(i, split, rng):
        period = rng.uniform(0.35, 0.7)
        times = np.arange(rng.uniform(0.1, period), 9.9, period)
        label = {"beat": times.tolist(), "downbeat": times[::4].tolist(), "tempo": 60 / period}
        path = f"genres/blues/{split}{i}.wav"
        return dict(wave=clicks(times, 10.0, rng), label=label, audio=path)

    return table(root, "GTZANBeatTracking", "GTZAN", make)


def musdb18(root: pathlib.Path) -> str:
    from mert_jax.tasks.musdb18 import VALIDATION

    rng = np.random.default_rng(0)
    songs = [("train", f"Song {i}") for i in range(3)]
    songs += [("train", VALIDATION[0]), ("test", "Song 8")]
    for part, song in songs:
        # one stem at a time, for a quarter of a second: noise, alike for all, and its own pitch;
        # BSS Eval has no score for a second in which a stem is quite silent
        turns = np.concatenate([rng.permutation(4) for _ in range(3)])
        stems = {}
        for m, name in enumerate(("vocals", "drums", "bass", "other")):
            wave = sine(200.0 * 3**m, 3.0, rng) + 0.1 * rng.standard_normal(3 * RATE)
            stems[name] = wave * np.repeat(np.where(turns == m, 1, 1e-3), RATE // 4)
        for name, wave in stems.items():
            save(root / part / song / f"{name}.wav", wave)
        save(root / part / song / "mixture.wav", sum(stems.values()))
    return str(root)


WRITERS = {
    "EMO": emo,
    "GS": gs,
    "GTZANBeatTracking": gtzan_beats,
    "GTZANGenre": gtzan_genre,
    "MTGGenre": tagged("MTGGenre", "MTG", ("genre---rock", "genre---90s")),
    "MTGInstrument": tagged("MTGInstrument", "MTG", ("instrument---voice", "instrument---pad")),
    "MTGMood": tagged("MTGMood", "MTG", ("mood/theme---film", "mood/theme---trailer")),
    "MTGTop50": tagged("MTGTop50", "MTG", ("genre---rock", "mood/theme---happy")),
    "MTT": tagged("MTT", "MTT", ("no vocals", "choral")),
    "MUSDB18": musdb18,
    "NSynthI": nsynth,
    "NSynthP": nsynth,
    "VocalSetS": vocalset,
    "VocalSetT": vocalset,
}
