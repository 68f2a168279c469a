"""VocalSet: ten singing techniques, twenty singers, in pieces of 3 s.

The layout is that of a43992899/MARBLE-Benchmark (`benchmark/tasks/VocalSet`), whose preparation
cuts the recordings: audio/TECHNIQUE/SINGER_..._NN.wav, and the pieces of each split, a line each,
in SPLIT_t.txt (techniques; five singers are kept for the test) and SPLIT_s.txt (singers).
"""

import functools
import os
from collections.abc import Callable

from mert_jax.errors import UserError
from mert_jax.tasks.task import SPLITS, Clip, Task, class_of, lines

TECHNIQUES = tuple(
    "belt breathy inhaled lip_trill spoken straight trill trillo vibrato vocal_fry".split()
)
SINGERS = (*(f"f{i}" for i in range(1, 10)), *(f"m{i}" for i in range(1, 12)))
SOURCE = (
    "Download VocalSet 1.1 (https://zenodo.org/records/1203819) as data/VocalSet/VocalSet.zip in a "
    "checkout of a43992899/MARBLE-Benchmark, run exp_scripts/preprocess/preprocess_vocalset.sh, "
    "which cuts it and writes the splits, and give --data=data/VocalSet."
)


def clips(data: str, suffix: str, label: Callable[[str], int]) -> dict[str, list[Clip]]:
    """The pieces of the three splits; `label` reads a line TECHNIQUE/SINGER_..._NN.wav."""
    splits = {}
    for split in SPLITS:
        path = os.path.join(data, f"{split}_{suffix}.txt")
        splits[split] = []
        for line in lines(path, SOURCE):
            try:
                splits[split].append(Clip(os.path.join(data, "audio", line), label=label(line)))
            except (KeyError, IndexError) as e:
                raise UserError(f"{path}: {line!r} is not TECHNIQUE/SINGER_..._NN.wav") from e
    return splits


def _task(name: str, labels: tuple[str, ...], suffix: str, label: Callable[[str], str]) -> Task:
    index = class_of(labels)
    return Task(
        name=name,
        kind="classes",
        labels=labels,
        metrics=("accuracy",),
        clips=functools.partial(clips, suffix=suffix, label=lambda line: index(label(line))),
        seconds=0.0,
        licence="CC BY 4.0",
        source=SOURCE,
        paper="Wilkins et al., ISMIR 2018",
    )


TECHNIQUE = _task("VocalSetT", TECHNIQUES, "t", lambda line: line.split("/")[0])
SINGER = _task("VocalSetS", SINGERS, "s", lambda line: line.split("/")[1].split("_")[0])
