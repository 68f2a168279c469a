"""EmoMusic: arousal and valence of 744 excerpts of 45 s, by regression."""

import functools

from mert_jax.tasks.task import Task, from_jsonl

LABELS = ("arousal", "valence")
SOURCE = (
    "Download the data set m-a-p/EMO from Hugging Face (huggingface-cli download --repo-type="
    "dataset m-a-p/EMO --local-dir=DIR; it has emomusic/wav/*.wav and EMO.*.jsonl) and give "
    "--data=DIR."
)


def values(label: list) -> tuple[float, float]:
    """Arousal and valence."""
    arousal, valence = map(float, label)
    return arousal, valence


EMO = Task(
    name="EMO",
    kind="regression",
    labels=LABELS,
    metrics=("r2", "r2_arousal", "r2_valence"),
    clips=functools.partial(from_jsonl, name="EMO", label=values, seconds=15.0, source=SOURCE),
    seconds=15.0,
    licence="CC BY-NC 3.0 and the licences of the Free Music Archive's recordings",
    source=SOURCE,
    paper="Soleymani et al., 2013",
)
