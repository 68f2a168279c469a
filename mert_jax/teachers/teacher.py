"""The interface of every teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mert_jax.tensors import state_dict


class Teacher(NamedTuple):
    """A frozen function from audio to targets.

    apply: (params, wave f32[B, N]) -> codes int32[B, T, K] or features f32[B, T, F]; integers mean
    cross-entropy, floats regression. params: every array it needs, none depending on N. size: V of
    codes, F of features. context: samples before a clip that it should hear for the clip's targets
    to be those of the whole recording.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    size: int
    context: int = 0


def fingerprint(teacher: Teacher) -> str:
    """Name a teacher by its arrays: equal names, equal targets."""
    return state_dict.fingerprint(teacher.params)
