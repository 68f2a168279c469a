"""Locks a workdir to one run, and refuses a changed config on resume."""

import contextlib
import fcntl
import json
import os
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from mert_jax.constants import CONFIG_FILE, LOCK_FILE, MODEL_FILE
from mert_jax.errors import UserError

# settings and groups of settings that may change on resume
CHANGEABLE = (
    *("total_steps", "log_every", "eval_every", "checkpoint", "mesh", "tensorboard"),
    *("watchdog_minutes", "data.dir", "data.threads", "data.workers", "data.accept_changes"),
    *("data.max_faulty", "model.remat", "model.unroll"),
)
# settings of earlier versions, with the only values that can still be resumed
REMOVED = {"model.attention_relax": 0.0, "model.fitted_gelu": False}


def _lock(path: str) -> Any:
    """Return an open file that locks `path` until it is closed or this process ends."""
    file = open(path, "a+")  # noqa: SIM115 (open for as long as the run)
    with contextlib.suppress(OSError):  # the file system has no locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = f"another run (process {file.read().strip() or 'unknown'})"
            message = f"is in use by {other}; stop it or choose another"
            raise UserError(f"--workdir={os.path.dirname(path)} {message}") from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
    return file


def lock_workdir(
    workdir: str, config: dict[str, Any], resumes: bool = False
) -> contextlib.AbstractContextManager:
    """Lock `workdir` until the result is closed, and write its config.json or check the old one.

    `resumes` says that it holds checkpoints. Raises UserError if it is in use or unusable, or holds
    a run of another config.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    if resumes and not os.path.exists(path):  # a workdir of convert --to=orbax
        todo = f"begin one with --config.init_from={workdir} and another --workdir"
        raise UserError(f"--workdir={workdir} holds a checkpoint without a run; {todo}")
    try:
        os.makedirs(workdir, exist_ok=True)
        first = jax.process_index() == 0
        file = _lock(os.path.join(workdir, LOCK_FILE)) if first else contextlib.nullcontext()
        if not os.path.exists(path):
            # several hosts may write to one shared directory at once
            temporary = f"{path}.{jax.process_index()}.tmp"
            with open(temporary, "w") as f:
                json.dump(config, f, indent=1)
            os.replace(temporary, path)
            return file
        with open(path) as f:
            before = json.load(f)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"--workdir={workdir} cannot be used: {e}") from e
    old, new = (flatten_dict(x, sep=".") for x in (before, json.loads(json.dumps(config))))
    old = {key: x for key, x in old.items() if key not in REMOVED or x != REMOVED[key]}
    changeable = tuple(f"{key}." for key in CHANGEABLE)
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not f"{key}.".startswith(changeable)
    ]
    if changed:
        todo = "choose another workdir or restore the setting"
        raise UserError(f"--workdir={workdir} holds a run with {'; '.join(changed)}; {todo}")
    return file


def release_workdir(workdir: str) -> None:
    """Remove the config of a workdir whose run has not begun, so that another config may use it."""
    if jax.process_index() == 0 and not os.path.exists(os.path.join(workdir, "metrics.jsonl")):
        for name in (CONFIG_FILE, MODEL_FILE, LOCK_FILE):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(workdir, name))
