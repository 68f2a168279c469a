"""Whose a workdir is: one run's at a time, and always of the same settings."""

import contextlib
import fcntl
import json
import os
from typing import Any

import jax

from mert_jax.constants import CONFIG_FILE, MODEL_FILE
from mert_jax.errors import UserError
from mert_jax.object_storage import LOCK

# what may differ between two calls on the same workdir: how long and how it is watched and spread
FREE = (
    *("total_steps", "log_every", "eval_every", "checkpoint", "mesh", "tensorboard"),
    *("watchdog_minutes", "data.dir", "data.threads", "data.workers", "data.accept_changes"),
    *("data.max_faulty", "model.remat", "model.unroll"),
)

# settings that earlier versions wrote, with the only values that this one can go on with
REMOVED = {"model.attention_relax": 0.0, "model.fitted_gelu": False}


def lock(workdir: str) -> Any:
    """Hold `workdir` for this process until it ends, however it ends; UserError where another one
    has it. Keep what is returned."""
    path = os.path.join(workdir, LOCK)
    try:
        os.makedirs(workdir, exist_ok=True)
        held = open(path, "a+")  # noqa: SIM115 (open for as long as the run)
    except OSError as e:
        raise UserError(f"--workdir={workdir} cannot be used: {e}") from e
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.seek(0)
        other = held.read().strip() or "unknown"
        raise UserError(
            f"--workdir={workdir} is in use by another run (process {other}); stop it, or choose "
            "another workdir"
        ) from None
    except OSError:  # a file system without locks
        return held
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held


def lock_workdir(
    workdir: str, config: dict[str, Any], begun: bool = False
) -> contextlib.AbstractContextManager:
    """Make `workdir` this run's own: write its config.json, or check the one that is there, which
    has to be if a run has `begun`. What is returned holds it against other processes until it is
    closed.

    Raises UserError when the directory cannot be written or holds a run of other settings, naming
    each with both values.
    """
    path = os.path.join(workdir, CONFIG_FILE)
    if begun and not os.path.exists(path):  # what convert --to=orbax makes
        raise UserError(
            f"--workdir={workdir} holds a checkpoint without a run; begin one from it with "
            f"--config.init_from={workdir} and another --workdir"
        )
    held = lock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    try:
        os.makedirs(workdir, exist_ok=True)
        if not os.path.exists(path):
            # the hosts of a run come here together, often in one shared directory
            temporary = f"{path}.{jax.process_index()}.tmp"
            with open(temporary, "w") as f:
                json.dump(config, f, indent=1)
            os.replace(temporary, path)
            return held
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
            "choose another workdir or take the setting back"
        )
    return held


def release_workdir(workdir: str) -> None:
    """Give up a claim on a workdir whose run has not begun, so that other settings may have it."""
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
