"""Saving and restoring a run: when, where, and whether what comes back is what was saved."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mert_jax import object_storage
from mert_jax.errors import RetryableError, UserError

STATE, CHECKSUMS = "default", "checksums"  # what a checkpoint consists of


def _news(record: logging.LogRecord) -> bool:
    """False for tracebacks that orbax's threads and event loops print of errors that they raise."""
    theirs = "orbax" in record.pathname or record.name == "asyncio"
    return absl.logging.get_verbosity() > absl.logging.WARNING or not (theirs and record.exc_info)


def _unraisable(unraisable: Any) -> None:
    """Leave out what tensorstore prints where a failed save has closed orbax's event loop."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _quiet() -> None:
    """Let a save that fails speak with one voice: that of the error it ends in."""
    absl.logging.get_absl_handler().addFilter(_news)
    sys.unraisablehook = _unraisable
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


class SavePolicy:
    """Whether a save is due, by steps and by minutes; the clock (seconds) is an argument."""

    def __init__(self, every_steps: int, every_minutes: float, clock: Callable[[], float]):
        self._steps, self._seconds, self._clock = every_steps, 60 * every_minutes, clock
        self._last, self._due = clock(), False

    @property
    def overdue(self) -> bool:
        """True when the minutes since the last save are over (0: never), by this host's clock."""
        return 0 < self._seconds <= self._clock() - self._last

    def due(self, step: int, asked: bool) -> bool:
        """True when `every_steps` divides `step` (0: never) or a host has `asked`, until `saved`:
        what cannot be saved now is saved later."""
        self._due |= asked or (self._steps > 0 and step % self._steps == 0)
        return self._due

    def saved(self) -> None:
        """It was."""
        self._last, self._due = self._clock(), False


def checkpoint_steps(workdir: str) -> list[int]:
    """Steps of the finished checkpoints in WORKDIR/checkpoints."""
    directory = epath.Path(object_storage.absolute(workdir)) / object_storage.CHECKPOINTS
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


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


class Preserved(NamedTuple):
    """Which checkpoints stay: the newest `keep`, as many of steps that `every_steps` divides, which
    those that a stop adds must not push out, and all that `keep_every` divides (0: none)."""

    keep: int
    keep_every: int
    every_steps: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each of `checkpoints`, oldest first (orbax calls it)."""
        del context
        steps = [each.step for each in checkpoints]
        divided = lambda by: [step for step in steps if by and step % by == 0]
        newest = lambda some: some[-self.keep :]
        stay = {*newest(steps), *newest(divided(self.every_steps)), *divided(self.keep_every)}
        return [step in stay for step in steps]


class Checkpoints:
    """The checkpoints of a run, in WORKDIR/checkpoints/STEP; saves are asynchronous and atomic.

    `Preserved` says which of them stay.
    """

    def __init__(self, workdir: str, keep: int, keep_every: int = 0, every_steps: int = 0):
        _quiet()
        self._workdir, self._every = workdir, every_steps
        self._manager = ocp.CheckpointManager(
            f"{object_storage.absolute(workdir)}/{object_storage.CHECKPOINTS}",
            item_names=(STATE, CHECKSUMS),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=Preserved(keep, keep_every, every_steps),
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

    def restore(self, state: Any, shardings: Any, before: int | None = None) -> Any:
        """The newest state that is whole, of a step below `before` where that is given, laid out by
        `shardings`; `state` gives shapes and dtypes (abstract).

        With `before`, steps that `every_steps` divides come first: a run that was stopped in
        between, and saved there, goes back to where one that was not would. Damaged ones are named
        and, once another was found whole, moved to WORKDIR/damaged. Raises UserError where there is
        none, and Again where a host of several could not read its part.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if before is not None:
            regular = lambda step: self._every > 0 and step % self._every == 0
            steps = sorted((s for s in steps if s < before), key=regular, reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                found = self._read(step, target, others=len(steps) > len(damaged) + 1)
            except Damaged as e:
                damaged[step] = str(e)
                print(f"checkpoint {step} is damaged: {e}", flush=True)
                continue
            self._set_aside(damaged)
            return found
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

    def _read(self, step: int, target: Any, others: bool) -> Any:
        items = {STATE: ocp.args.StandardRestore(target), CHECKSUMS: ocp.args.JsonRestore()}
        try:
            with said_as(Damaged):
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Damaged as e:
            if jax.process_count() == 1 or not others:
                raise
            # the other hosts may have read their parts, and wait for this one: all begin again
            self._move(step)
            raise RetryableError(f"checkpoint {step} is damaged: {e}; it was set aside") from e
        with said_as(Damaged):  # on all hosts alike
            verify(found[STATE], found[CHECKSUMS])
        return found[STATE]

    def _set_aside(self, steps: Iterable[int]) -> None:
        for step in steps:
            if jax.process_index() == 0:
                self._move(step)
        if steps:
            multihost_utils.sync_global_devices("set aside")
            self._manager.reload()

    def _move(self, step: int) -> None:
        workdir = epath.Path(object_storage.absolute(self._workdir))
        kept = workdir / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another host was faster
            (workdir / object_storage.CHECKPOINTS / str(step)).rename(kept)
            print(f"moved it to {kept}", flush=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with said_as(OSError):
                yield
        except OSError as e:
            remote = object_storage.is_remote(self._workdir)
            good = checkpoint_steps(self._workdir)
            raise (RetryableError if remote else UserError)(
                f"a checkpoint could not be written to {self._workdir}/checkpoints: {e}; the last "
                f"whole one is of step {good[-1] if good else 'none'}. "
                f"{'R' if remote else 'Make room and r'}un the same command again"
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
