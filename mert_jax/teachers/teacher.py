"""The interface of a teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mert_jax.tensors import state_dict


class Teacher(NamedTuple):
    """A frozen function from audio to the targets of a student.

    apply: (params, wave f32[B, N]) -> codes int32[B, T, K], learned by cross-entropy, or features
    f32[B, T, F], learned by regression.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any  # every array that `apply` needs, none depending on N
    size: int  # V of codes, F of features
    context: int = 0  # samples before a clip that make its targets those of the whole recording


def fingerprint(teacher: Teacher) -> str:
    """Return a digest of the teacher's arrays: equal digests, equal targets."""
    return state_dict.fingerprint(teacher.params)
