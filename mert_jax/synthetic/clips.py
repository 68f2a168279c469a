"""A made task on disk: DIR/NAME/audio, one list of clips a split, about.json."""

import collections
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import soundfile

from mert_jax import files
from mert_jax.errors import UserError
from mert_jax.synthetic.recipe import SAMPLE_RATE, SEED, SPLITS, Clip, Recipe

BITS = 16


def write(folder: str, recipe: Recipe, settings: dict[str, Any], done: Callable[[], Any]) -> None:
    """Render the clips of `recipe` into `folder`, which appears when it is whole; call `done` after
    each. The lists have the keys of MARBLE's (https://github.com/a43992899/MARBLE), and made_of.
    """
    name = os.path.basename(os.path.abspath(folder))
    with files.atomic_write(folder) as path:
        os.makedirs(os.path.join(path, "audio"))
        lines = collections.defaultdict(list)
        for clip in recipe.clips:
            file = f"audio/{clip.split}-{len(lines[clip.split]):05d}.flac"
            lines[clip.split].append(_write_clip(path, file, clip))
            done()
        for split in SPLITS:
            with open(os.path.join(path, f"{name}.{split}.jsonl"), "w") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines[split])
        with open(os.path.join(path, "about.json"), "w") as f:
            json.dump(_about(name, recipe, settings, lines), f, indent=1)
            f.write("\n")


def _write_clip(path: str, file: str, clip: Clip) -> dict[str, Any]:
    wave = clip.wave()
    samples = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
    soundfile.write(os.path.join(path, file), samples, SAMPLE_RATE, subtype=f"PCM_{BITS}")
    return {
        "audio_path": file,
        "label": clip.label,
        "duration": len(samples) / SAMPLE_RATE,
        "sample_rate": SAMPLE_RATE,
        "num_samples": len(samples),
        "bit_depth": BITS,
        "channels": 1,
        "made_of": clip.made_of,
    }


def _about(name: str, recipe: Recipe, settings: dict, lines: dict[str, list]) -> dict[str, Any]:
    counts = {}
    for split in SPLITS:
        labels = [x for line in lines[split] for x in _labels(line)]
        counts[split] = {
            "clips": len(lines[split]),
            "minutes": round(sum(line["duration"] for line in lines[split]) / 60, 2),
            "labels": dict(sorted(collections.Counter(labels).items())),
        }
    return {
        "name": name,
        **recipe.about,
        "settings": settings,
        "seed": SEED,
        "counts": counts,
        "versions": {x: version(x) for x in ("mert_jax", "numpy", "soundfile", "soxr")},
    }


def _labels(line: dict[str, Any]) -> list[str]:
    label = line["label"]
    if isinstance(label, dict):
        return ["beat"] * len(label["beat"])
    return [label] if isinstance(label, str) else label


def check(folder: str, settings: dict[str, Any]) -> None:
    """Raises UserError where the task in `folder` was made with other settings."""
    try:
        with open(os.path.join(folder, "about.json")) as f:
            before = json.load(f)["settings"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder} is no made task ({e}); remove it or change --output") from e
    if before != settings:
        raise UserError(
            f"{folder} was made with {before}, now {settings}; remove it, or give another --output"
        )
