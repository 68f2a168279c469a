"""MUSDB18: a mixture into vocals, drums, bass and the rest.

The layout is that of MUSDB18-HQ, and of MUSDB18 after `musdbconvert`: train/SONG/ and test/SONG/
with mixture.wav and one file a stem. Fourteen songs of train are for validation (sigsep's musdb,
`configs/mus.yaml`).
"""

import os

from mert_jax.tasks.task import SPLITS, Clip, Task, cut, existing

STEMS = ("vocals", "drums", "bass", "other")
SECONDS = 10.0
VALIDATION = (
    "ANiMAL - Rockshow, Actions - One Minute Smile, Alexander Ross - Goodbye Bolero, Clara Berry "
    "And Wooldog - Waltz For My Victims, Fergessen - Nos Palpitants, James May - On The Line, "
    "Johnny Lokke - Promises & Lies, Leaf - Summerghost, Meaxic - Take A Step, Patrick Talbot - A "
    "Reason To Leave, Skelpolu - Human Mistakes, Traffic Experiment - Sirens, Triviul - Angelsaint,"
    " Young Griffo - Pennies"
).split(", ")
SOURCE = (
    "Download MUSDB18-HQ (https://zenodo.org/records/3338373), unpack it in DIR, so that there are "
    "DIR/train/SONG/mixture.wav and DIR/test/SONG/mixture.wav, and give --data=DIR."
)


def _clips(data: str) -> dict[str, list[Clip]]:
    """Cut every song from end to end; the last clip is shorter, and `group` is the song."""
    splits = {split: [] for split in SPLITS}
    for part in ("train", "test"):
        root = existing(os.path.join(data, part), SOURCE)
        for song in sorted(os.listdir(root)):
            folder = os.path.join(root, song)
            if not os.path.isdir(folder):
                continue
            paths = [os.path.join(folder, f"{name}.wav") for name in ("mixture", *STEMS)]
            mixture, *stems = [existing(path, SOURCE) for path in paths]
            label = dict(zip(STEMS, stems, strict=True))
            split = "valid" if part == "train" and song in VALIDATION else part
            # a rest shorter than a second is left out
            for start in cut(mixture, SECONDS, keep=1 / SECONDS):
                splits[split].append(Clip(mixture, start, SECONDS, label, f"{part}/{song}"))
    return splits


LICENCE = "for education and research only; each song has its own"
PAPER = "Rafii et al., 2017 (doi 10.5281/zenodo.1117372)"
TASKS = (Task("MUSDB18", "separation", STEMS, _clips, LICENCE, SOURCE, PAPER, SECONDS),)
