"""NSynth: pitch (128 classes) and family of instruments (11) of single notes of 4 s.

The layout is the data set's own, as a43992899/MARBLE-Benchmark reads it
(`benchmark/tasks/NSynth`): nsynth-SPLIT/examples.json and nsynth-SPLIT/audio/NAME.wav.
"""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

from mert_jax.errors import UserError
from mert_jax.tasks.task import SPLITS, Clip, Task, class_of

FAMILIES = tuple(
    "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal".split()
)
SOURCE = (
    "Download nsynth-train, nsynth-valid and nsynth-test (.jsonwav.tar.gz, from "
    "https://magenta.tensorflow.org/datasets/nsynth), unpack all three in DIR and give --data=DIR."
)


def clips(data: str, label: Callable[[dict[str, Any]], int]) -> dict[str, list[Clip]]:
    """The notes of the three splits; `label` reads an entry of examples.json."""
    splits = {}
    for split in SPLITS:
        root = os.path.join(data, f"nsynth-{split}")
        path = os.path.join(root, "examples.json")
        if not os.path.isfile(path):
            raise UserError(f"{path} is not there. {SOURCE}")
        try:
            with open(path) as file:
                examples = json.load(file)
            splits[split] = [
                Clip(os.path.join(root, "audio", f"{name}.wav"), label=label(entry))
                for name, entry in examples.items()
            ]
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{path} is not NSynth's: {type(e).__name__} {e}") from e
    return splits


def _task(name: str, labels: tuple[str, ...], label: Callable[[dict[str, Any]], int]) -> Task:
    return Task(
        name=name,
        kind="classes",
        labels=labels,
        metrics=("accuracy",),
        clips=functools.partial(clips, label=label),
        seconds=0.0,
        licence="CC BY 4.0",
        source=SOURCE,
        paper="Engel et al., arXiv 1704.01279",
    )


PITCH = _task("NSynthP", tuple(map(str, range(128))), lambda entry: range(128)[entry["pitch"]])
INSTRUMENT = _task(
    "NSynthI", FAMILIES, lambda entry: class_of(FAMILIES)(entry["instrument_family_str"])
)
