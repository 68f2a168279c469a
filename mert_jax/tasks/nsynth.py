"""NSynth: pitch (128 classes) and family of instruments (11) of single notes of 4 s.

The layout is the data set's own, as a43992899/MARBLE-Benchmark reads it
(`benchmark/tasks/NSynth`): nsynth-SPLIT/examples.json and nsynth-SPLIT/audio/NAME.wav.
"""

import json
import os

from mert_jax.errors import UserError
from mert_jax.tasks.task import SPLITS, Clip, Task, existing

FAMILIES = tuple(
    "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal".split()
)
SOURCE = (
    "Download nsynth-train, nsynth-valid and nsynth-test (.jsonwav.tar.gz, from "
    "https://magenta.tensorflow.org/datasets/nsynth), unpack all three in DIR and give --data=DIR."
)


def _task(name: str, column: str, labels: tuple[str, ...]) -> Task:
    index = {label: i for i, label in enumerate(labels)}

    def read(root: str) -> list[Clip]:
        path = existing(os.path.join(root, "examples.json"), SOURCE)
        try:
            with open(path) as file:
                classes = {x: index[str(row[column])] for x, row in json.load(file).items()}
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{path} is not NSynth's: {type(e).__name__} {e}. {SOURCE}") from e
        return [Clip(os.path.join(root, "audio", f"{x}.wav"), label=i) for x, i in classes.items()]

    def clips(data: str) -> dict[str, list[Clip]]:
        return {split: read(os.path.join(data, f"nsynth-{split}")) for split in SPLITS}

    paper = "Engel et al., arXiv 1704.01279"
    return Task(name, "classes", labels, clips, licence="CC BY 4.0", source=SOURCE, paper=paper)


TASKS = (
    _task("NSynthP", "pitch", tuple(map(str, range(128)))),
    _task("NSynthI", "instrument_family_str", FAMILIES),
)
