"""The synthetic probe datasets of `mert_jax.make_tasks`."""

import functools

from mert_jax.synthetic import drums, instruments, melodies
from mert_jax.tasks.gtzan import beats as beats_of
from mert_jax.tasks.task import Task, class_of, from_jsonl, tags_of

RENDERED = (
    "the audio is rendered with the soundfonts that about.json names (FluidR3_GM: MIT, TimGM6mb: "
    "GPL-2)"
)


def _task(
    name: str,
    labels: tuple[str, ...],
    seconds: float,
    kind: str = "classes",
    metrics: tuple[str, ...] = ("accuracy",),
    licence: str = RENDERED,
) -> Task:
    source = (
        f"python -m mert_jax.make_tasks --output=DIR --only={name} makes it; then --data=DIR/{name}"
    )
    readers = {"tags": tags_of(labels), "beats": beats_of}
    clips = functools.partial(
        from_jsonl,
        name=name,
        label=readers.get(kind, class_of(labels)),
        seconds=seconds,
        source=source,
        beats=kind == "beats",
    )
    paper = "none: mert_jax/synthetic"
    return Task(name, kind, labels, metrics, clips, seconds, licence, source, paper)


PITCH = _task("made_pitch", instruments.PITCH_LABELS, instruments.NOTE_SECONDS)
INSTRUMENT = _task("made_instrument", instruments.INSTRUMENT_LABELS, instruments.NOTE_SECONDS)
TECHNIQUE = _task("made_technique", instruments.TECHNIQUE_LABELS, instruments.TECHNIQUE_SECONDS)
MIX = _task(
    "made_mix",
    instruments.MIX_LABELS,
    instruments.MIX_SECONDS,
    "tags",
    ("roc_auc", "average_precision"),
)
KEY = _task(
    "made_key", melodies.KEY_LABELS, melodies.KEY_SECONDS, "key", ("weighted_score", "accuracy")
)
BEAT = _task(
    "made_beat",
    ("beat",),
    melodies.BEAT_SECONDS,
    "beats",
    ("f_measure", "f_measure_20ms", "f_measure_pooled"),
)
DRUMS = _task(
    "made_drums",
    drums.LABELS,
    drums.SECONDS,
    licence="by kit, see about.json: CC0, CC-BY, CC-BY-SA, GPL-2",
)
