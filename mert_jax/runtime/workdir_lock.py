"""Locks a workdir to one run, and refuses a changed config on resume."""

import contextlib
import fcntl
import json
import os
from typing import Any

import jax

from mert_jax.constants import CONFIG_FILE, MODEL_FILE
from mert_jax.errors import UserError
from mert_jax.object_storage import LOCK

# settings that may change on resume
FREE = (
    *("total_steps", "log_every", "eval_every", "checkpoint", "mesh", "tensorboard"),
    *("watchdog_minutes", "data.dir", "data.threads", "data.workers", "data.accept_changes"),
    *("data.max_faulty", "model.remat", "model.unroll"),
)
# settings of earlier versions, with the only values that can still be resumed
REMOVED = {"model.attention_relax": 0.0, "model.fitted_gelu": False}


def _lock(workdir: str) -> Any:
    """Return an open file that locks `workdir` until it is closed or this process ends."""
    path = os.path.join(workdir, LOCK)
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (open for as long as the run)
    except OSError as e:
        raise UserError(f"--workdir={workdir} cannot be used: {e}") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        other = file.read().strip() or "unknown"
        raise UserError(
            f"--workdir={workdir} is in use by another run (process {other}); stop it, or choose "
            "another workdir"
        ) from None
    except OSError:  # the file system has no locks
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def lock_workdir(
    workdir: str, config: dict[str, Any], begun: bool = False
) -> contextlib.AbstractContextManager:
    """Lock `workdir` until the result is closed, and write its config.json or check the old one.

    Raises UserError if the directory is in use or cannot be written, if a run has `begun` without a
    config.json, and for changed settings, with both values of each.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    if begun and not os.path.exists(path):  # a workdir of convert --to=orbax
        raise UserError(
            f"--workdir={workdir} holds a checkpoint without a run; begin one from it with "
            f"--config.init_from={workdir} and another --workdir"
        )
    file = _lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    try:
        os.makedirs(workdir, exist_ok=True)
        if not os.path.exists(path):
            # several hosts may write to one shared directory at once
            temporary = f"{path}.{jax.process_index()}.tmp"
            with open(temporary, "w") as f:
                json.dump(config, f, indent=1)
            os.replace(temporary, path)
            return file
        with open(path) as f:
            before = json.load(f)
    except (OSError, ValueError) as e:  # ValueError: neither JSON nor text
        raise UserError(f"--workdir={workdir} cannot be used: {e}") from e
    old, new = _flat(before), _flat(json.loads(json.dumps(config)))
    old = {key: x for key, x in old.items() if key not in REMOVED or x != REMOVED[key]}
    changed = [
        f"{key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old | new)
        if old.get(key) != new.get(key) and not f"{key}.".startswith(tuple(f"{x}." for x in FREE))
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds a run of other settings ({'; '.join(changed)}); "
            "choose another workdir or restore the setting"
        )
    return file


def release_workdir(workdir: str) -> None:
    """Remove the config of a workdir whose run has not begun, so that another config may use it."""
    if jax.process_index() == 0 and not os.path.exists(os.path.join(workdir, "metrics.jsonl")):
        for name in (CONFIG_FILE, MODEL_FILE, LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(workdir, name))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
