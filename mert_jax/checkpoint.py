"""Saving and restoring a run: when, where, and what it must agree with."""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from mert_jax.cli import UserError

CONFIG, MODEL = "config.json", "model.json"  # of a workdir: the settings, the student


class SavePolicy:
    """Whether a save is due, by steps and by minutes; the clock (seconds) is an argument."""

    def __init__(self, every_steps: int, every_minutes: float, clock: Callable[[], float]):
        self._steps, self._seconds, self._clock = every_steps, 60 * every_minutes, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """True when `step` is a multiple of `every_steps` or the minutes are over (0: never)."""
        now = self._clock()
        by_steps = self._steps > 0 and step % self._steps == 0
        by_time = self._seconds > 0 and now - self._last >= self._seconds
        if by_steps or by_time:
            self._last = now
        return by_steps or by_time


def steps(workdir: str) -> list[int]:
    """Steps of the finished checkpoints in WORKDIR/checkpoints."""
    directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
    return sorted(ocp.utils.checkpoint_steps(directory)) if os.path.isdir(directory) else []


class Checkpoints:
    """The checkpoints of a run, in WORKDIR/checkpoints/STEP; saves are asynchronous and atomic."""

    def __init__(self, workdir: str, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            os.path.abspath(os.path.join(workdir, "checkpoints")), options=options
        )

    @property
    def latest_step(self) -> int | None:
        """Completed updates of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to save `state`, unless this step is saved already."""
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, state: Any, shardings: Any) -> Any:
        """The newest state, laid out by `shardings`; `state` gives shapes and dtypes (abstract)."""
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        return self._manager.restore(self.latest_step, args=ocp.args.StandardRestore(target))

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


# what may differ between two calls on the same workdir: how long and how it is watched and spread
FREE = (
    *("total_steps", "log_every", "eval_every", "checkpoint", "mesh", "tensorboard"),
    *("data.dir", "data.threads", "data.workers"),
)


def claim(workdir: str, config: dict[str, Any]) -> None:
    """Make `workdir` this run's own: write its config.json, or check the one that is there.

    Raises UserError when the directory cannot be written or holds a run of other settings, naming
    each with both values.
    """
    path = os.path.join(workdir, CONFIG)
    if steps(workdir) and not os.path.exists(path):  # what convert --to=orbax makes
        raise UserError(
            f"--workdir={workdir} holds a checkpoint without a run; begin one from it with "
            f"--config.init_from={workdir} and another --workdir"
        )
    try:
        os.makedirs(workdir, exist_ok=True)
        if not os.path.exists(path):
            # the hosts of a run come here together, often in one shared directory
            temporary = f"{path}.{jax.process_index()}.tmp"
            with open(temporary, "w") as f:
                json.dump(config, f, indent=1)
            os.replace(temporary, path)
            return
        with open(path) as f:
            before = json.load(f)
    except (OSError, ValueError) as e:  # ValueError: neither JSON nor text
        raise UserError(f"--workdir={workdir} cannot be used: {e}") from e
    old, new = _flat(before), _flat(json.loads(json.dumps(config)))
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


def release(workdir: str) -> None:
    """Give up a claim on a workdir whose run has not begun, so that other settings may have it."""
    if jax.process_index() == 0 and not os.path.exists(os.path.join(workdir, "metrics.jsonl")):
        for name in (CONFIG, MODEL):
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
