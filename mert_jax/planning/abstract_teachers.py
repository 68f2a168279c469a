"""The teachers of a plan: those of the config, or their shapes where there is no checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mert_jax.constants import HOP_LENGTH
from mert_jax.data import stored_codes as codes
from mert_jax.errors import UserError
from mert_jax.models import encodec
from mert_jax.pretraining import build
from mert_jax.teachers import kmeans, mel_rvq, rvq_vae
from mert_jax.teachers.teacher import Teacher

STORED = "rvq_vae"  # what `prepare --codes` stores


def stored_codes(config: ConfigDict, choice: str) -> dict[str, codes.CodesInfo]:
    """The codes that come with the batch, by teacher.

    choice: "stored", "computed" or, "", what the dataset has. Raises UserError where a teacher's
    codes cannot be stored.
    """
    if choice == "computed" or not (choice or config.data.dir):
        return {}
    found = build.find_stored_codes(config) if config.data.dir else {}
    if choice != "stored" or found:
        return found
    if STORED not in config.teachers:
        raise UserError(
            f"--codes=stored: of the teachers {tuple(config.teachers)} none is {STORED}, whose "
            "codes are the only ones that a dataset stores; leave --codes out"
        )
    books = config.teacher[STORED].get("books") or BOOKS
    return {STORED: codes.CodesInfo(STORED, books, SIZE, HOP_LENGTH, "", "", {}, {})}


def make(config: ConfigDict, stored: Mapping[str, codes.CodesInfo]) -> dict[str, Teacher]:
    """The config's teachers, by name; of one whose checkpoint is not given, only the shapes."""
    made = {}
    for name in config.teachers:
        one = config.copy_and_resolve_references()
        one.teachers = (name,)
        options = one.teacher.get(name, {})
        if name in stored and not stored[name].fingerprint:  # one of no real dataset
            options.checkpoint = ""
        elif name not in stored and name in SHAPES and not options.get("checkpoint"):
            made[name] = SHAPES[name](options)
            continue
        made |= build.make_teachers(one, stored)
    return made


# EnCodec at 24 kHz, in the eight books that MERT takes
BOOKS, SIZE = 8, 1024


def _rvq_vae(options: Mapping[str, Any]) -> Teacher:
    encoder = encodec.Encoder()
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 3200))))
    books = options.get("books") or BOOKS
    params = {"encoder": params["params"], "codebooks": _array(books, SIZE, encoder.dim)}
    return Teacher(rvq_vae.apply, params, SIZE, options.get("context", rvq_vae.CONTEXT))


def _fitted(module: Any, size: Callable[[Mapping[str, Any]], int]) -> Callable[..., Teacher]:
    def make(options: Mapping[str, Any]) -> Teacher:
        known = {key: value for key, value in options.items() if key in module.SETTINGS and value}
        settings = module.SETTINGS | known
        arrays = {key: _array(*shape) for key, shape in module.shapes(settings).items()}
        params = jax.eval_shape(lambda: module.filters(settings)) | arrays
        bound = lambda params, wave: module.apply(params, wave, hop=settings["hop"])
        return Teacher(bound, params, size(settings))

    return make


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


SHAPES = {
    "rvq_vae": _rvq_vae,
    "kmeans": _fitted(kmeans, lambda settings: max(settings["mel_size"], settings["chroma_size"])),
    "mel_rvq": _fitted(mel_rvq, lambda settings: settings["size"]),
}
