"""The synthetic probe datasets of `mert_jax.make_tasks`."""

import functools

from mert_jax.synthetic import beats, drums, keys, mixes, notes, techniques
from mert_jax.tasks.gtzan import beats as beats_of
from mert_jax.tasks.task import Task, class_of, from_jsonl, tags_of

RENDERED = (
    "the audio is rendered with the soundfonts that about.json names (FluidR3_GM: MIT, TimGM6mb: "
    "GPL-2)"
)


def _task(
    name: str,
    kind: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    seconds: float,
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


PITCH = _task("made_pitch", "classes", notes.PITCH_LABELS, ("accuracy",), notes.SECONDS)
INSTRUMENT = _task(
    "made_instrument", "classes", notes.INSTRUMENT_LABELS, ("accuracy",), notes.SECONDS
)
KEY = _task("made_key", "key", keys.LABELS, ("weighted_score", "accuracy"), keys.SECONDS)
BEAT = _task(
    "made_beat",
    "beats",
    ("beat",),
    ("f_measure", "f_measure_20ms", "f_measure_pooled"),
    beats.SECONDS,
)
MIX = _task("made_mix", "tags", mixes.LABELS, ("roc_auc", "average_precision"), mixes.SECONDS)
TECHNIQUE = _task("made_technique", "classes", techniques.LABELS, ("accuracy",), techniques.SECONDS)
DRUMS = _task(
    "made_drums",
    "classes",
    drums.LABELS,
    ("accuracy",),
    drums.SECONDS,
    "by kit, see about.json: CC0, CC-BY, CC-BY-SA, GPL-2",
)
