"""The interface of a teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mert_jax.tensors import state_dict


class Teacher(NamedTuple):
    """A frozen function from audio to the targets of a student.

    apply: (params, wave f32[B, N]) -> codes int32[B, T, K], learned by cross-entropy, or features
    f32[B, T, F], learned by regression. params: every array it needs, none depending on N. size: V
    of codes, F of features. context: samples before a clip that `apply` has to hear for the clip's
    targets to equal those of the whole recording.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    size: int
    context: int = 0


def fingerprint(teacher: Teacher) -> str:
    """Return a digest of the teacher's arrays: equal digests, equal targets."""
    return state_dict.fingerprint(teacher.params)
