"""GiantSteps key: 24 keys of electronic dance music, scored as MIREX does.

Training and validation are the MTG keys' set, the test the 604 tracks of Knees et al.
"""

import functools

from mert_jax.tasks.task import Task, class_of, from_jsonl

TONICS = "C Db D Eb E F Gb G Ab A Bb B".split()
LABELS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
SOURCE = (
    "Download the data set m-a-p/GS from Hugging Face (huggingface-cli download --repo-type=dataset"
    " m-a-p/GS --local-dir=DIR; it has giantsteps_clips/wav/*.wav and GS.*.jsonl) and give "
    "--data=DIR."
)

GS = Task(
    name="GS",
    kind="key",
    labels=LABELS,
    metrics=("weighted_score", "accuracy"),
    clips=functools.partial(
        from_jsonl,
        name="GS",
        label=class_of(LABELS),
        seconds=30.0,
        source=SOURCE,
        group="ori_uid",  # the track that a 30 s clip is of
    ),
    seconds=30.0,
    licence="annotations CC BY-NC-SA 4.0; the previews are Beatport's: research use",
    source=SOURCE,
    paper="Knees et al., ISMIR 2015",
)
