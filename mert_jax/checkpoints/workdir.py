"""Reads and writes workdirs, of runs and of `convert --to=orbax`.

model.json describes the student, checkpoints/STEP holds a `TrainState`.
"""

import contextlib
import errno
import os

import jax.numpy as jnp
import optax
from flax import traverse_util

from mert_jax import files
from mert_jax.checkpoints import manager, tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint, architecture, student_of
from mert_jax.checkpoints.train_state import AdamState, TrainState, initial_guard
from mert_jax.constants import CHECKPOINTS, CONFIG_FILE, MODEL_FILE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.tensors import state_dict

# fields of About that model.json stores; the others come from the run's own files
DESCRIPTION_FIELDS = [name for name in About._fields if name not in ("config", "metrics")]


def write_description(workdir: str, student: Student, about: About) -> None:
    """Write WORKDIR/model.json, which `read_checkpoint` needs beside the weights."""
    fields = {key: getattr(about, key) for key in DESCRIPTION_FIELDS}
    description = {"student": architecture(student)} | fields
    files.write_json(os.path.join(workdir, MODEL_FILE), description)


def read_about(workdir: str) -> About:
    """Return the fields of `About` that WORKDIR/model.json stores. Raises UserError without it."""
    description = state_dict.read_json(os.path.join(workdir, MODEL_FILE))
    return About(**{key: description[key] for key in DESCRIPTION_FIELDS if key in description})


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """Read the newest checkpoint of a workdir, or WORKDIR/checkpoints/STEP itself."""
    workdir, step = path, max(manager.checkpoint_steps(path), default=None)
    if os.path.exists(os.path.join(path, "_CHECKPOINT_METADATA")):
        parent, name = os.path.split(os.path.abspath(path))
        if not name.isdecimal():
            raise UserError(f"{path} is a checkpoint away from its run: put it in checkpoints/STEP")
        workdir, step = os.path.dirname(parent), int(name)
    if step is None:
        raise UserError(f"{path} has no finished checkpoint in {CHECKPOINTS}/ yet")
    description = state_dict.read_json(os.path.join(workdir, MODEL_FILE))
    try:
        student, about = student_of(description["student"]), read_about(workdir)
    except (KeyError, TypeError) as e:
        raise UserError(f"{workdir}/{MODEL_FILE} does not describe a student: {e!r}") from e
    trees = manager.read_arrays(os.path.join(workdir, CHECKPOINTS), step, moments)
    shapes = {name: x.shape for name, x in tensor_names.abstract_params(student).items()}
    for label, tree in trees.items():
        flat = traverse_util.flatten_dict(tree, sep="/")
        tensor_names.check_tensors(flat, shapes, f"{workdir}, {label} of step {step}")
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
    step, moments, opt_state = jnp.int32(checkpoint.step), checkpoint.moments, ()
    if moments:  # as `optimizer.make` chains them
        empty, schedule = optax.EmptyState(), optax.ScaleByScheduleState(step)
        opt_state = empty, AdamState(step, *moments), empty, schedule
    state = TrainState(step, step, checkpoint.params, opt_state, initial_guard(1))
    try:
        with contextlib.closing(manager.Checkpoints(path, keep=1)) as checkpoints:
            checkpoints.save(checkpoint.step, state)
    except (ValueError, RuntimeError) as e:  # what tensorstore raises on a full disk
        raise OSError(errno.EIO, str(e)) from e
    write_description(path, checkpoint.student, checkpoint.about)
