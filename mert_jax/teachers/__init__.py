"""Teachers: what the student learns to predict of the clean wave, one function each.

`make` returns one by name.
"""

from mert_jax.teachers.registry import make
from mert_jax.teachers.teacher import Teacher, fingerprint

__all__ = ["Teacher", "fingerprint", "make"]
