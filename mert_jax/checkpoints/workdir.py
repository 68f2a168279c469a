"""Reads and writes workdirs: those of runs, and those that `convert --to=orbax` writes.

WORKDIR/model.json describes the student, WORKDIR/checkpoints/STEP holds a `TrainState`. A run also
has config.json and metrics.jsonl.
"""

import contextlib
import errno
import json
import os

import jax.numpy as jnp
from flax import traverse_util

from mert_jax import files
from mert_jax.checkpoints import manager, tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint, architecture, student_of
from mert_jax.checkpoints.train_state import AdamState, TrainState, initial_guard, optimizer_state
from mert_jax.constants import CONFIG_FILE, MODEL_FILE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.object_storage import CHECKPOINTS
from mert_jax.tensors import state_dict

# fields of About that model.json stores; the others come from the run's own files
DESCRIPTION_FIELDS = (
    *("sample_rate", "do_normalize", "dtype", "flat_moments", "special_codes", "row_orders"),
    *("teachers", "licence", "data", "lineage"),
)


def write_description(workdir: str, student: Student, about: About) -> None:
    """Write WORKDIR/model.json, which `read_checkpoint` needs beside the weights."""
    fields = {key: getattr(about, key) for key in DESCRIPTION_FIELDS}
    path = os.path.join(workdir, MODEL_FILE)
    with files.atomic_write(path, replace=True) as temporary, open(temporary, "w") as file:
        json.dump({"student": architecture(student)} | fields, file, indent=1)


def read_about(workdir: str) -> About:
    """Return the fields of `About` that WORKDIR/model.json stores. Raises UserError without it."""
    description = state_dict.read_json(os.path.join(workdir, MODEL_FILE))
    return About(**{key: description[key] for key in DESCRIPTION_FIELDS if key in description})


def _locate(path: str) -> tuple[str, int]:
    """Split WORKDIR (at its newest step) or WORKDIR/checkpoints/STEP into workdir and step.

    Raises UserError without a checkpoint.
    """
    if os.path.exists(os.path.join(path, "_CHECKPOINT_METADATA")):
        step = os.path.basename(os.path.normpath(path))
        if not step.isdecimal():
            raise UserError(
                f"{path} is a checkpoint away from its run: put it at WORKDIR/checkpoints/STEP"
            )
        return os.path.dirname(os.path.dirname(os.path.abspath(path))), int(step)
    steps = manager.checkpoint_steps(path)
    if not steps:
        raise UserError(f"{path} has no finished checkpoint in {CHECKPOINTS}/ yet")
    return path, steps[-1]


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """Read the newest checkpoint of a workdir, or WORKDIR/checkpoints/STEP itself.

    Raises UserError as `reading.read_checkpoint` does.
    """
    workdir, step = _locate(path)
    description = state_dict.read_json(os.path.join(workdir, MODEL_FILE))
    try:
        student, about = student_of(description["student"]), read_about(workdir)
    except (KeyError, TypeError) as e:
        raise UserError(f"{workdir}/{MODEL_FILE} does not describe a student: {e!r}") from e
    state = manager.read_arrays(os.path.join(workdir, CHECKPOINTS), step, moments)
    trees = {f"step {step}": state["params"]}
    # the other parts of the optimizer's state come without arrays
    for part in filter(None, state.get("opt_state") or ()):
        trees |= {key: part[key] for key in ("mu", "nu")}
    shapes = {name: x.shape for name, x in tensor_names.abstract_params(student).items()}
    for label, tree in trees.items():
        flat = traverse_util.flatten_dict(tree, sep="/")
        tensor_names.check_tensors(flat, shapes, f"{workdir}, {label}")
    params, *adam = trees.values()
    config = os.path.join(workdir, CONFIG_FILE)
    rows = files.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
    about = about._replace(
        config=state_dict.read_json(config) if os.path.exists(config) else {},
        metrics=next((row for row in reversed(rows) if row["step"] <= step), {}),
        lineage=(*about.lineage, f"{os.path.basename(os.path.abspath(workdir))} (step {step})"),
    )
    return Checkpoint(student, params, tuple(adam) or None, step, about)


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Fill the directory `path` with a workdir of one checkpoint. Raises OSError if that fails."""
    step = jnp.int32(checkpoint.step)
    moments = checkpoint.moments
    opt_state = optimizer_state(AdamState(step, *moments), step) if moments else ()
    try:
        with contextlib.closing(manager.Checkpoints(path, keep=1)) as checkpoints:
            state = TrainState(step, step, checkpoint.params, opt_state, initial_guard(1))
            checkpoints.save(checkpoint.step, state)
    except (ValueError, RuntimeError) as e:  # what tensorstore raises on a full disk
        raise OSError(errno.EIO, str(e)) from e
    write_description(path, checkpoint.student, checkpoint.about)
