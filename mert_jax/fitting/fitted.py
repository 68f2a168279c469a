"""Fitting a teacher to a prepared dataset: what each fit is given and gives back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mert_jax.fitting.figures import Book
from mert_jax.fitting.sampling import Sampler


class Task(NamedTuple):
    """What is fitted to: frames of a dataset, a seed, and at most so many iterations a codebook."""

    sampler: Sampler
    seed: int
    iterations: int


class Fitted(NamedTuple):
    """A fitted teacher: its arrays, the settings they follow from, and how well its books do, by
    split ("train" and, where the dataset has one, "validation")."""

    tensors: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    figures: Mapping[str, list[Book]]
