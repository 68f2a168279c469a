"""Saving and restoring a run: when, where, and what it must agree with."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mert_jax.cli import UserError

# of a workdir: the settings, the student, and who is at work there
CONFIG, MODEL, LOCK = "config.json", "model.json", "lock"
STATE, CHECKSUMS = "default", "checksums"  # what a checkpoint consists of


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


def checksum(x: jax.Array) -> jax.Array:
    """A number, uint32, in which any changed or displaced bit of `x` shows: the sum of its words,
    each times twice its index plus one. How `x` is sharded does not matter: the sum is of integers,
    modulo 2**32."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


_all_checksums = jax.jit(lambda leaves: jnp.stack([checksum(x) for x in leaves]))


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of `tree`, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sums = np.asarray(_all_checksums([jnp.asarray(x) for _, x in leaves])).tolist()
    return dict(zip(paths, sums, strict=True))


def verify(tree: Any, expected: Mapping[str, int]) -> None:
    """Raise ValueError where arrays of `tree` are not those whose checksums were kept."""
    found = checksums(tree)
    if wrong := [path for path, number in found.items() if expected.get(path) != number]:
        raise ValueError(f"{len(wrong)} of {len(found)} arrays are not as saved, {wrong[0]} first")


@contextlib.contextmanager
def said_as(kind: type[Exception]) -> Iterator[None]:
    """Whatever orbax and tensorstore raise for files that are missing, cut short or garbled, as a
    `kind` of one line."""
    try:
        yield
    except Exception as e:
        # orbax wraps some errors in an Exception of no class of its own; others are not about files
        if type(e) is not Exception and not isinstance(
            e, OSError | ValueError | KeyError | TypeError | AttributeError
        ):
            raise
        raise kind(" ".join(str(e.__cause__ or e).split())[:300]) from e


class Damaged(Exception):
    """A checkpoint that cannot be read, or is not as it was saved."""


class Checkpoints:
    """The checkpoints of a run, in WORKDIR/checkpoints/STEP; saves are asynchronous and atomic.

    The newest `keep` stay, and those of steps that `keep_every` divides (0: none).
    """

    def __init__(self, workdir: str, keep: int, keep_every: int = 0):
        self._workdir = workdir
        self._manager = ocp.CheckpointManager(
            os.path.abspath(os.path.join(workdir, "checkpoints")),
            item_names=(STATE, CHECKSUMS),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                create=True,
                cleanup_tmp_directories=True,  # what a killed run was writing
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Completed steps of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to save `state`, unless this step is saved already; UserError where the save before
        it could not be written."""
        if step == self._manager.latest_step():
            return
        sums = checksums(state)
        items = {STATE: ocp.args.StandardSave(state), CHECKSUMS: ocp.args.JsonSave(sums)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raise UserError if a save that was begun could not be written."""
        with self._writing():
            self._manager.check_for_errors()

    def restore(self, state: Any, shardings: Any, before: int | None = None, every: int = 0) -> Any:
        """The newest state that is whole, of a step below `before` where that is given, laid out by
        `shardings`; `state` gives shapes and dtypes (abstract).

        Steps that `every` divides come first: a run that was stopped in between, and saved there,
        goes back to where one that was not would. Damaged ones are named and, once another was
        found whole, moved to WORKDIR/damaged. Raises UserError where there is none.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        self.wait()
        regular = lambda step: every > 0 and step % every == 0
        steps = [s for s in self._manager.all_steps() if before is None or s < before]
        damaged: dict[int, str] = {}
        for step in sorted(steps, key=lambda s: (regular(s), s), reverse=True):
            try:
                with said_as(Damaged):
                    items = {
                        STATE: ocp.args.StandardRestore(target),
                        CHECKSUMS: ocp.args.JsonRestore(),
                    }
                    found = self._manager.restore(step, args=ocp.args.Composite(**items))
                    verify(found[STATE], found[CHECKSUMS])
            except Damaged as e:
                damaged[step] = str(e)
                print(f"checkpoint {step} is damaged: {e}", flush=True)
                continue
            self._set_aside(damaged)
            return found[STATE]
        if not damaged:
            raise UserError(
                f"{self._workdir}/checkpoints has none of before step {before} to go back to: save "
                "more often (checkpoint.every_steps), or keep more (checkpoint.keep)"
            )
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {self._workdir}/checkpoints can be used "
            f"({'; '.join(f'{step}: {why}' for step, why in damaged.items())}); nothing was "
            "changed. Bring one back, or begin anew in another workdir"
        )

    def _set_aside(self, steps: Iterable[int]) -> None:
        aside = os.path.join(self._workdir, "damaged")
        for step in steps:
            if jax.process_index() == 0:
                os.makedirs(aside, exist_ok=True)
                kept = os.path.join(aside, f"{step}-{time.strftime('%Y%m%d-%H%M%S')}")
                os.replace(os.path.join(self._workdir, "checkpoints", str(step)), kept)
                print(f"moved it to {kept}", flush=True)
        if steps:
            self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with said_as(OSError):
                yield
        except OSError as e:
            good = steps(self._workdir)
            raise UserError(
                f"a checkpoint could not be written to {self._workdir}/checkpoints: {e}; the last "
                f"whole one is of step {good[-1] if good else 'none'}. Make room and run the same "
                "command again"
            ) from e

    def forget(self, above: int) -> None:
        """Delete the checkpoints of steps above `above`: those of a course that was given up."""
        for step in [s for s in self._manager.all_steps() if s > above]:
            self._manager.delete(step)

    def wait(self) -> None:
        """Wait until everything is on disk; UserError where it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait` does, and end."""
        self.wait()
        self._manager.close()


# what may differ between two calls on the same workdir: how long and how it is watched and spread
FREE = (
    *("total_steps", "log_every", "eval_every", "checkpoint", "mesh", "tensorboard"),
    *("watchdog_minutes", "data.dir", "data.threads", "data.workers", "data.accept_changes"),
    "data.max_faulty",
)


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


def claim(workdir: str, config: dict[str, Any]) -> contextlib.AbstractContextManager:
    """Make `workdir` this run's own: write its config.json, or check the one that is there. What is
    returned holds it against other processes until it is closed.

    Raises UserError when the directory cannot be written or holds a run of other settings, naming
    each with both values.
    """
    path = os.path.join(workdir, CONFIG)
    if steps(workdir) and not os.path.exists(path):  # what convert --to=orbax makes
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


def release(workdir: str) -> None:
    """Give up a claim on a workdir whose run has not begun, so that other settings may have it."""
    if jax.process_index() == 0 and not os.path.exists(os.path.join(workdir, "metrics.jsonl")):
        for name in (CONFIG, MODEL, LOCK):
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
