"""MUSDB18: a mixture into vocals, drums, bass and the rest.

The layout is that of MUSDB18-HQ, and of MUSDB18 after `musdbconvert`: train/SONG/ and test/SONG/
with mixture.wav and one file a stem. Fourteen songs of train are for validation (sigsep's musdb,
`configs/mus.yaml`).
"""

import os

import soundfile

from mert_jax.errors import UserError
from mert_jax.tasks.task import Clip, Task, cut, folder

STEMS = ("vocals", "drums", "bass", "other")
SECONDS = 10.0
VALIDATION = (
    "ANiMAL - Rockshow",
    "Actions - One Minute Smile",
    "Alexander Ross - Goodbye Bolero",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Fergessen - Nos Palpitants",
    "James May - On The Line",
    "Johnny Lokke - Promises & Lies",
    "Leaf - Summerghost",
    "Meaxic - Take A Step",
    "Patrick Talbot - A Reason To Leave",
    "Skelpolu - Human Mistakes",
    "Traffic Experiment - Sirens",
    "Triviul - Angelsaint",
    "Young Griffo - Pennies",
)
SOURCE = (
    "Download MUSDB18-HQ (https://zenodo.org/records/3338373), unpack it in DIR, so that there are "
    "DIR/train/SONG/mixture.wav and DIR/test/SONG/mixture.wav, and give --data=DIR."
)


def clips(data: str) -> dict[str, list[Clip]]:
    """Ten seconds after ten seconds of every song; `group` is the song."""
    splits = {"train": [], "valid": [], "test": []}
    for part in ("train", "test"):
        root = folder(os.path.join(data, part), SOURCE)
        for song in sorted(os.listdir(root)):
            if not os.path.isdir(os.path.join(root, song)):
                continue
            mixture = os.path.join(root, song, "mixture.wav")
            stems = {name: os.path.join(root, song, f"{name}.wav") for name in STEMS}
            if missing := [path for path in (mixture, *stems.values()) if not os.path.exists(path)]:
                raise UserError(f"{missing[0]} is not there. {SOURCE}")
            split = "valid" if part == "train" and song in VALIDATION else part
            splits[split] += [
                Clip(mixture, start, length, stems, f"{part}/{song}")
                for start, length in _whole(mixture)
            ]
    return splits


def _whole(path: str) -> list[tuple[float, float | None]]:
    """Return the clips of a song, the last one shorter: songs are scored from end to end."""
    starts = cut(path, None, SECONDS)
    try:
        header = soundfile.info(path)
    except (OSError, RuntimeError):
        return starts
    length = header.frames / header.samplerate
    rest = length - starts[-1][0] - SECONDS
    return [*starts, (starts[-1][0] + SECONDS, SECONDS)] if rest > 1.0 else starts


MUSDB18 = Task(
    name="MUSDB18",
    kind="separation",
    labels=STEMS,
    metrics=("sdr", "sdr_museval"),
    clips=clips,
    seconds=SECONDS,
    licence="for education and research only; each song has its own",
    source=SOURCE,
    paper="Rafii et al., 2017 (doi 10.5281/zenodo.1117372)",
)
