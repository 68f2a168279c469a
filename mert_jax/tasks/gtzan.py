"""GTZAN: genre (10 classes) and beats (GTZAN-Rhythm), both on the artist-filtered split."""

import functools

from mert_jax.tasks.task import Task, class_of, from_jsonl

LABELS = tuple("blues classical country disco hiphop jazz metal pop reggae rock".split())
LICENCE = "none stated; the recordings are in copyright: research use"
SOURCE = (
    "Download the data set m-a-p/GTZAN from Hugging Face (huggingface-cli download --repo-type="
    "dataset m-a-p/GTZAN --local-dir=DIR; it has genres/GENRE/*.wav and the split's jsonl files) "
    "and give --data=DIR."
)

GENRE = Task(
    name="GTZANGenre",
    kind="classes",
    labels=LABELS,
    metrics=("accuracy",),
    # a little more than a file has, as in MARBLE: a file is a clip
    clips=functools.partial(
        from_jsonl, name="GTZANGenre", label=class_of(LABELS), seconds=30.2, source=SOURCE
    ),
    seconds=30.2,
    licence=LICENCE,
    source=SOURCE,
    paper="Tzanetakis and Cook, 2002; the split: Sturm, arXiv 1306.1461",
)


def beats(label: dict) -> tuple[float, ...]:
    """Beat times in seconds from the start of the file."""
    return tuple(float(time) for time in label["beat"])


BEATS = Task(
    name="GTZANBeatTracking",
    kind="beats",
    labels=("beat",),
    metrics=("f_measure", "f_measure_20ms", "f_measure_pooled"),
    clips=functools.partial(
        from_jsonl, name="GTZANBeatTracking", label=beats, seconds=10.0, source=SOURCE, beats=True
    ),
    seconds=10.0,
    licence=LICENCE,
    source=SOURCE,
    paper="Marchand, Fresnel and Peeters, ISMIR 2015 (late breaking)",
)
