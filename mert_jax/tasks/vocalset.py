"""VocalSet: ten singing techniques, twenty singers, in pieces of 3 s.

The layout is that of a43992899/MARBLE-Benchmark (`benchmark/tasks/VocalSet`), whose preparation
cuts the recordings: audio/TECHNIQUE/SINGER_..._NN.wav, and the pieces of each split, a line each,
in SPLIT_t.txt (techniques; five singers are kept for the test) and SPLIT_s.txt (singers).
"""

import os

from mert_jax.errors import UserError
from mert_jax.tasks.task import SPLITS, Clip, Task, lines

TECHNIQUES = tuple(
    "belt breathy inhaled lip_trill spoken straight trill trillo vibrato vocal_fry".split()
)
SINGERS = (*(f"f{i}" for i in range(1, 10)), *(f"m{i}" for i in range(1, 12)))
SOURCE = (
    "Download VocalSet 1.1 (https://zenodo.org/records/1203819) as data/VocalSet/VocalSet.zip in a "
    "checkout of a43992899/MARBLE-Benchmark, run exp_scripts/preprocess/preprocess_vocalset.sh, "
    "which cuts it and writes the splits, and give --data=data/VocalSet."
)


def _task(name: str, labels: tuple[str, ...], suffix: str) -> Task:
    index = {label: i for i, label in enumerate(labels)}

    def read(data: str, path: str) -> list[Clip]:
        clips = []
        for line in lines(path, SOURCE):
            technique, _, file = line.partition("/")
            label = index.get(technique if suffix == "t" else file.split("_")[0])
            if label is None:
                raise UserError(f"{path}: {line!r} is not TECHNIQUE/SINGER_..._NN.wav")
            clips.append(Clip(os.path.join(data, "audio", line), label=label))
        return clips

    def clips(data: str) -> dict[str, list[Clip]]:
        return {x: read(data, os.path.join(data, f"{x}_{suffix}.txt")) for x in SPLITS}

    paper = "Wilkins et al., ISMIR 2018"
    return Task(name, "classes", labels, clips, licence="CC BY 4.0", source=SOURCE, paper=paper)


TASKS = (_task("VocalSetT", TECHNIQUES, "t"), _task("VocalSetS", SINGERS, "s"))
