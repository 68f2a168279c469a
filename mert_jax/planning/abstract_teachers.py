"""The teachers of a plan: those of the config, or their shapes without a checkpoint."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mert_jax.constants import HOP_LENGTH
from mert_jax.data.stored_codes import CodesInfo
from mert_jax.errors import UserError
from mert_jax.models import encodec
from mert_jax.pretraining import build
from mert_jax.teachers import kmeans, mel_rvq, rvq_vae
from mert_jax.teachers.teacher import Teacher

STORED = "rvq_vae"  # the only teacher whose codes `prepare --codes` stores
NUM_CODEBOOKS, CODEBOOK_SIZE = 8, 1024  # of EnCodec at 24 kHz, as MERT uses it
# fitted teachers, and the settings that give their number of classes, the largest of them
FITTED = {"kmeans": (kmeans, ("mel_size", "chroma_size")), "mel_rvq": (mel_rvq, ("size",))}


def stored_codes(config: ConfigDict, choice: str) -> dict[str, CodesInfo]:
    """Return the codes in a batch by teacher; choice: stored, computed, "" as in the dataset."""
    stored = build.find_stored_codes(config) if config.data.dir and choice != "computed" else {}
    if stored or choice != "stored":
        return stored
    if STORED not in config.teachers:
        reason = f"of the teachers {tuple(config.teachers)} none is {STORED}, the only one stored"
        raise UserError(f"--codes=stored: {reason} in a dataset; leave --codes out")
    books = config.teacher[STORED].get("books") or NUM_CODEBOOKS
    return {STORED: CodesInfo(STORED, books, CODEBOOK_SIZE, HOP_LENGTH, "", "", {}, {})}


def make(config: ConfigDict, stored: Mapping[str, CodesInfo]) -> dict[str, Teacher]:
    """Return the config's teachers by name, only the shapes of those without a checkpoint."""
    config = config.copy_and_resolve_references()
    names, abstract = config.teachers, {}
    for name in names:
        options = config.teacher.get(name, {})
        if name in stored:
            if not stored[name].fingerprint:  # codes of no real dataset
                options.checkpoint = ""
        elif name == STORED and not options.get("checkpoint"):
            abstract[name] = _rvq_vae(options)
        elif name in FITTED and not options.get("checkpoint"):
            abstract[name] = _fitted(options, *FITTED[name])
    config.teachers = tuple(name for name in names if name not in abstract)
    teachers = abstract | build.make_teachers(config, stored)
    return {name: teachers[name] for name in names}


def _rvq_vae(options: Mapping[str, Any]) -> Teacher:
    encoder = encodec.Encoder()
    params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 3200))))
    books = options.get("books") or NUM_CODEBOOKS
    codebooks = jax.ShapeDtypeStruct((books, CODEBOOK_SIZE, encoder.dim), jnp.float32)
    params = {"encoder": params["params"], "codebooks": codebooks}
    return Teacher(rvq_vae.apply, params, CODEBOOK_SIZE, options.get("context", rvq_vae.CONTEXT))


def _fitted(options: Mapping[str, Any], module: ModuleType, sizes: tuple[str, ...]) -> Teacher:
    given = {key: value for key, value in options.items() if key in module.SETTINGS and value}
    settings = module.SETTINGS | given
    params = jax.eval_shape(lambda: module.filters(settings))
    for name, shape in module.shapes(settings).items():
        params[name] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def apply(params: Any, wave: jax.Array) -> jax.Array:
        return module.apply(params, wave, hop=settings["hop"])

    return Teacher(apply, params, max(settings[name] for name in sizes))
