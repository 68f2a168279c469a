"""The teachers by name."""

import inspect

from mert_jax.errors import UserError
from mert_jax.teachers import cqt, kmeans, mel_rvq, random_projection, rvq_vae
from mert_jax.teachers.teacher import Teacher

MODULES = (cqt, kmeans, mel_rvq, random_projection, rvq_vae)
TEACHERS = {module.__name__.rpartition(".")[2]: module.make for module in MODULES}


def make(name: str, **options) -> Teacher:
    """Make the teacher `name` with its module's options. Raises UserError for an unknown one."""
    if name not in TEACHERS:
        raise UserError(f"unknown teacher {name!r}; choose one of {', '.join(TEACHERS)}")
    known = inspect.signature(TEACHERS[name]).parameters
    if unknown := ", ".join(sorted(set(options) - set(known))):
        raise UserError(f"teacher {name!r} has no option {unknown}; it has {', '.join(known)}")
    return TEACHERS[name](**options)
