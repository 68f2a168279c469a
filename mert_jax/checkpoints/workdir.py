"""Checkpoints of ours: a run's workdir, or what `convert --to=orbax` made, which is like one.

WORKDIR/model.json says what the student is, WORKDIR/checkpoints/STEP holds its state as
`step.TrainState`. A run has config.json and metrics.jsonl besides.
"""

import contextlib
import errno
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mert_jax import files
from mert_jax.checkpoints import manager as checkpoint
from mert_jax.checkpoints import tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint, architecture, student_of
from mert_jax.checkpoints.train_state import AdamState, TrainState, initial_guard, optimizer_state
from mert_jax.constants import MODEL_FILE
from mert_jax.errors import UserError
from mert_jax.files import read_jsonl
from mert_jax.models.mert_v1 import Student
from mert_jax.tensors import state_dict

# of About, what model.json holds; the rest lies in the run's own files
KEPT = (
    *("sample_rate", "do_normalize", "dtype", "flat_moments", "special_codes", "row_orders"),
    *("teachers", "licence", "data", "lineage"),
)


def write_description(workdir: str, student: Student, about: About) -> None:
    """Write WORKDIR/model.json, what `read` needs beside the weights."""
    content = {"student": architecture(student)} | {key: getattr(about, key) for key in KEPT}
    path = os.path.join(workdir, MODEL_FILE)
    with files.atomic_write(path, replace=True) as temporary, open(temporary, "w") as f:
        json.dump(content, f, indent=1)


def read_about(workdir: str) -> About:
    """What WORKDIR/model.json says beside the student; UserError where it says nothing."""
    content = state_dict.read_json(os.path.join(workdir, MODEL_FILE))
    return About(**{key: content[key] for key in KEPT if key in content})


def locate(path: str) -> tuple[str, int]:
    """The workdir of `path`, which is one or WORKDIR/checkpoints/STEP, and the step: the newest or
    the one named. UserError where there is none."""
    if os.path.exists(os.path.join(path, "_CHECKPOINT_METADATA")):
        step = os.path.basename(os.path.normpath(path))
        if not step.isdecimal():
            raise UserError(
                f"{path} is a checkpoint away from its run: put it at WORKDIR/checkpoints/STEP"
            )
        return os.path.dirname(os.path.dirname(os.path.abspath(path))), int(step)
    steps = checkpoint.checkpoint_steps(path)
    if not steps:
        raise UserError(f"{path} has no finished checkpoint in checkpoints/ yet")
    return path, max(steps)


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """The newest checkpoint of a workdir, or WORKDIR/checkpoints/STEP itself.

    Raises UserError as `formats.read` does.
    """
    workdir, step = locate(path)
    content = state_dict.read_json(os.path.join(workdir, MODEL_FILE))
    try:
        student = student_of(content["student"])
        about = About(**{key: content[key] for key in KEPT if key in content})
    except (KeyError, TypeError) as e:
        raise UserError(f"{workdir}/{MODEL_FILE} does not describe a student: {e!r}") from e
    state = _restore(os.path.join(workdir, "checkpoints"), step, moments)
    params = _checked(state["params"], student, f"{workdir}, step {step}")
    found = None
    if adam := [x for x in state.get("opt_state") or () if x]:
        found = tuple(_checked(adam[0][key], student, f"{workdir}, {key}") for key in ("mu", "nu"))
    run = os.path.join(workdir, "config.json")
    rows = read_jsonl(os.path.join(workdir, "metrics.jsonl"))
    about = about._replace(
        config=state_dict.read_json(run) if os.path.exists(run) else {},
        metrics=next((row for row in reversed(rows) if row["step"] <= step), {}),
        lineage=(*about.lineage, f"{os.path.basename(os.path.abspath(workdir))} (step {step})"),
    )
    return Checkpoint(student, params, found, step, about)


def _restore(directory: str, step: int, moments: bool) -> dict[str, Any]:
    """The state as nested dicts and lists of numpy arrays, the optimiser's without `moments` left
    out."""
    handlers = {
        checkpoint.STATE: ocp.PyTreeCheckpointHandler(),
        checkpoint.CHECKSUMS: ocp.JsonCheckpointHandler(),
    }
    manager = ocp.CheckpointManager(os.path.abspath(directory), item_handlers=handlers)
    try:
        with checkpoint.said_as(checkpoint.Damaged):
            tree = manager.item_metadata(step)[checkpoint.STATE]
            items = {
                checkpoint.STATE: _wanted(tree, moments),
                checkpoint.CHECKSUMS: ocp.args.JsonRestore(),
            }
            found = manager.restore(step, args=ocp.args.Composite(**items))
            checkpoint.verify(found[checkpoint.STATE], found[checkpoint.CHECKSUMS])
        return found[checkpoint.STATE]
    except checkpoint.Damaged as e:
        raise UserError(f"{directory}/{step} cannot be read: {e}") from e
    finally:
        manager.close()


def _wanted(tree: Any, moments: bool) -> ocp.args.PyTreeRestore:
    """What of a saved state to read, as numpy arrays: parameters and, if asked for, `moments`."""
    wanted = {"params": tree["params"]}
    if moments:
        wanted["opt_state"] = [
            {key: part[key] for key in ("mu", "nu")} if part and "mu" in part else None
            for part in tree["opt_state"] or ()
        ]
    arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        wanted,
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    return ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)


def _checked(params: Any, student: Student, path: str) -> Any:
    """`params` itself, if it is `student`'s and finite; UserError with all that is not."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = {name: x.shape for name, x in tensor_names.abstract(student).items()}
    problems = [f"missing {name}" for name in shapes if name not in flat]
    problems += [f"unexpected {name}" for name in flat if name not in shapes]
    for name in shapes.keys() & flat.keys():
        if flat[name].shape != shapes[name]:
            problems.append(f"{name} is {list(flat[name].shape)}, not {list(shapes[name])}")
        elif bad := np.count_nonzero(~np.isfinite(flat[name])):
            problems.append(f"{name} has {bad} values that are not finite")
    tensor_names.refuse(problems, path)
    return params


def write_checkpoint(path: str, content: Checkpoint) -> None:
    """Fill the directory `path` with a workdir that holds `content`; OSError where the disk does
    not take it."""
    step = jnp.int32(content.step)
    opt_state: Any = ()
    if content.moments:
        adam = AdamState(step, *content.moments)
        opt_state = optimizer_state(adam, step)
    try:
        with contextlib.closing(checkpoint.Checkpoints(path, keep=1)) as checkpoints:
            state = TrainState(step, step, content.params, opt_state, initial_guard(1))
            checkpoints.save(content.step, state)
    except (ValueError, RuntimeError) as e:  # tensorstore's words for a full disk
        raise OSError(errno.EIO, str(e)) from e
    write_description(path, content.student, content.about)
