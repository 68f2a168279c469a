"""The tasks by name."""

import importlib

from mert_jax.errors import UserError
from mert_jax.tasks.task import Task

# name: (module of this package, attribute)
TABLE = {
    "EMO": ("emo", "EMO"),
    "GS": ("gs", "GS"),
    "GTZANBeatTracking": ("gtzan", "BEATS"),
    "GTZANGenre": ("gtzan", "GENRE"),
    "MTGGenre": ("mtg", "GENRE"),
    "MTGInstrument": ("mtg", "INSTRUMENT"),
    "MTGMood": ("mtg", "MOOD"),
    "MTGTop50": ("mtg", "TOP50"),
    "MTT": ("mtt", "MTT"),
    "MUSDB18": ("musdb18", "MUSDB18"),
    "NSynthI": ("nsynth", "INSTRUMENT"),
    "NSynthP": ("nsynth", "PITCH"),
    "VocalSetS": ("vocalset", "SINGER"),
    "VocalSetT": ("vocalset", "TECHNIQUE"),
    "made_beat": ("made", "BEAT"),
    "made_drums": ("made", "DRUMS"),
    "made_instrument": ("made", "INSTRUMENT"),
    "made_key": ("made", "KEY"),
    "made_mix": ("made", "MIX"),
    "made_pitch": ("made", "PITCH"),
    "made_technique": ("made", "TECHNIQUE"),
}


def get_task(name: str) -> Task:
    """Return the task called `name`, in any case. Raises UserError for an unknown name."""
    known = {key.lower(): key for key in TABLE}
    if name.lower() not in known:
        raise UserError(f"unknown task {name!r}; there are {', '.join(sorted(TABLE))}")
    module, attribute = TABLE[known[name.lower()]]
    return getattr(importlib.import_module(f"mert_jax.tasks.{module}"), attribute)
