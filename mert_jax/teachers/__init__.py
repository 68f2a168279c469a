"""Teachers: functions from the clean wave to the targets that the student predicts."""

from mert_jax.teachers.registry import make
from mert_jax.teachers.teacher import Teacher, fingerprint

__all__ = ["Teacher", "fingerprint", "make"]
