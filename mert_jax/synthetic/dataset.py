"""Synthetic probe datasets: their clips, and their folder DIR/NAME on disk."""

import collections
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.files import atomic_write

SPLITS = ("train", "val", "test")
SEED = 20_240
BITS = 16
PEAK = 32_767  # the int16 value of 1.0
Rng = np.random.Generator


class NotInstalled(UserError):
    """A missing source of a dataset; the message names the command that installs it."""


class Clip(NamedTuple):
    """One example; wave: computes f32[N] at SAMPLE_RATE.

    label: a class, a list of tags, or {"beat": seconds}, as in MARBLE's lists.
    """

    split: str
    label: Any
    made_of: dict[str, Any]
    wave: Callable[[], np.ndarray]


class Recipe(NamedTuple):
    """The clips of a dataset, and the sources and licences for its about.json."""

    clips: Sequence[Clip]
    about: dict[str, Any]


def rng(*names: object) -> Rng:
    """Return a random generator seeded by `names`, equal on every machine."""
    return np.random.default_rng([SEED, *"/".join(map(str, names)).encode()])


def numbered(*counts: int) -> Iterator[tuple[str, int]]:
    """Yield (split, i) for each i below the count of train, val and test."""
    return ((split, i) for split, n in zip(SPLITS, counts, strict=True) for i in range(n))


def vary_level(wave: np.ndarray, draw: Rng, noise_db: tuple[float, float] = (40, 70)) -> np.ndarray:
    """Add noise `noise_db` [dB] below the peak and change the level: neither predicts the label."""
    noise = draw.standard_normal(len(wave)).astype(np.float32)
    wave = wave / float(np.abs(wave).max()) + 10 ** (-draw.uniform(*noise_db) / 20) * noise
    return (10 ** (-draw.uniform(1, 20) / 20) / np.abs(wave).max() * wave).astype(np.float32)


def write_dataset(
    folder: str, recipe: Recipe, settings: dict[str, Any], on_clip: Callable[[], Any]
) -> None:
    """Write audio/*.flac, lists with the keys of github.com/a43992899/MARBLE, and about.json."""
    name, rows = os.path.basename(os.path.abspath(folder)), {split: [] for split in SPLITS}
    with atomic_write(folder) as temporary:
        path = Path(temporary)
        (path / "audio").mkdir(parents=True)
        for clip in recipe.clips:
            row = {"audio_path": f"audio/{clip.split}-{len(rows[clip.split]):05d}.flac"}
            samples = np.round(np.clip(clip.wave(), -1, 1) * PEAK).astype(np.int16)
            soundfile.write(path / row["audio_path"], samples, SAMPLE_RATE, f"PCM_{BITS}")
            row |= dict(label=clip.label, duration=len(samples) / SAMPLE_RATE)
            row |= dict(sample_rate=SAMPLE_RATE, num_samples=len(samples), bit_depth=BITS)
            rows[clip.split].append(row | dict(channels=1, made_of=clip.made_of))
            on_clip()
        for split in SPLITS:
            lines = [json.dumps(row) + "\n" for row in rows[split]]
            (path / f"{name}.{split}.jsonl").write_text("".join(lines))
        about = {"name": name, **recipe.about, "settings": settings, "seed": SEED}
        about["counts"] = {split: _counts(rows[split]) for split in SPLITS}
        about["versions"] = {x: version(x) for x in ("mert_jax", "numpy", "soundfile", "soxr")}
        (path / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    labels = collections.Counter()
    for row in rows:
        label = row["label"]
        if isinstance(label, dict):
            labels["beat"] += len(label["beat"])
        else:
            labels.update([label] if isinstance(label, str) else label)
    minutes = round(sum(row["duration"] for row in rows) / 60, 2)
    return {"clips": len(rows), "minutes": minutes, "labels": dict(sorted(labels.items()))}


def check_settings(folder: str, settings: dict[str, Any]) -> None:
    """Raise UserError unless `folder` holds a dataset that was written with `settings`."""
    try:
        before = json.loads(Path(folder, "about.json").read_text())["settings"]
    except (OSError, ValueError, KeyError) as e:
        message = f"{folder} is not a dataset of make_tasks ({e}); remove it or change --output"
        raise UserError(message) from e
    if before != settings:
        change = "remove it, or give another --output"
        raise UserError(f"{folder} was made with {before}, now {settings}; {change}")
