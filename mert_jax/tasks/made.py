"""The synthetic probe datasets of `mert_jax.make_tasks`."""

from mert_jax.synthetic import drums, instruments, melodies
from mert_jax.tasks.task import Task, jsonl_task

RENDERED = (
    "the audio is rendered with the soundfonts that about.json names (FluidR3_GM: MIT, TimGM6mb: "
    "GPL-2)"
)
PAPER = "none: mert_jax/synthetic"
REAL_DRUMS = "by kit, see about.json: CC0, CC-BY, CC-BY-SA, GPL-2"


def _task(
    name: str, kind: str, labels: tuple[str, ...], seconds: float, licence: str = RENDERED
) -> Task:
    command = f"python -m mert_jax.make_tasks --output=DIR --only={name}"
    source = f"{command} makes it; then --data=DIR/{name}"
    return jsonl_task(name, kind, labels, seconds, source=source, licence=licence, paper=PAPER)


NOTE, TECHNIQUE = instruments.NOTE_SECONDS, instruments.TECHNIQUE_SECONDS
TASKS = (
    _task("made_pitch", "classes", instruments.PITCH_LABELS, NOTE),
    _task("made_instrument", "classes", instruments.INSTRUMENT_LABELS, NOTE),
    _task("made_technique", "classes", instruments.TECHNIQUE_LABELS, TECHNIQUE),
    _task("made_mix", "tags", instruments.MIX_LABELS, instruments.MIX_SECONDS),
    _task("made_key", "key", melodies.KEY_LABELS, melodies.KEY_SECONDS),
    _task("made_beat", "beats", ("beat",), melodies.BEAT_SECONDS),
    _task("made_drums", "classes", drums.LABELS, drums.SECONDS, REAL_DRUMS),
)
