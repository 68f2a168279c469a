"""MagnaTagATune: the 50 most frequent tags of 29 s excerpts."""

import functools

from mert_jax.tasks.task import Task, from_jsonl, tags_of

LABELS = (
    *"guitar classical slow techno strings drums electronic rock fast piano ambient beat".split(),
    *"violin vocal synth female indian opera male singing vocals".split(),
    "no vocals",
    *"harpsichord loud quiet flute woman".split(),
    *("male vocal", "no vocal"),
    *"pop soft sitar solo man classic choir voice".split(),
    *("new age", "dance", "male voice", "female vocal", "beats", "harp", "cello", "no voice"),
    *("weird", "country", "metal", "female voice", "choral"),
)
SOURCE = (
    "Download the data set m-a-p/MTT from Hugging Face (huggingface-cli download --repo-type="
    "dataset m-a-p/MTT --local-dir=DIR; it has mp3/ and MTT.*.jsonl) and give --data=DIR."
)

MTT = Task(
    name="MTT",
    kind="tags",
    labels=LABELS,
    metrics=("roc_auc", "average_precision"),
    clips=functools.partial(
        from_jsonl, name="MTT", label=tags_of(LABELS), seconds=30.0, source=SOURCE
    ),
    seconds=30.0,
    licence="annotations free for research; recordings of Magnatune, CC BY-NC-SA",
    source=SOURCE,
    paper="Law et al., ISMIR 2009",
)
