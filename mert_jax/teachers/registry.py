"""The teachers by name."""

import inspect

from mert_jax.errors import UserError
from mert_jax.teachers import cqt, kmeans, mel_rvq, random_projection, rvq_vae
from mert_jax.teachers.teacher import Teacher

TEACHERS = {
    "cqt": cqt.make,
    "kmeans": kmeans.make,
    "mel_rvq": mel_rvq.make,
    "random_projection": random_projection.make,
    "rvq_vae": rvq_vae.make,
}


def make(name: str, **options) -> Teacher:
    """Make the teacher called `name` ("cqt", "kmeans", ...); options are its own keywords.

    Raises UserError for an unknown name or option.
    """

    if name not in TEACHERS:
        raise UserError(f"unknown teacher {name!r}; there are {', '.join(sorted(TEACHERS))}")
    known = inspect.signature(TEACHERS[name]).parameters
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"teacher {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return TEACHERS[name](**options)
