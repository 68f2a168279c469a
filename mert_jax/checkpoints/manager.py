"""Saves and restores checkpoints with Orbax, verified by checksums.

This is the only module that imports Orbax: a move to another version of its API is one file.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

STATE, CHECKSUMS = "default", "checksums"  # the items of a checkpoint


def _orbax_filter(record: logging.LogRecord) -> bool:
    """Return False for a traceback that Orbax's threads log of an error that they also raise."""
    from_orbax = "orbax" in record.pathname or record.name == "asyncio"
    verbose = absl.logging.get_verbosity() > absl.logging.WARNING
    return verbose or not (from_orbax and record.exc_info)


def _silence_orbax() -> None:
    """Report a failed save by the exception it raises only, and not from Orbax's threads too."""

    def unraisable_hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # by a failed save
            sys.__unraisablehook__(unraisable)

    absl.logging.get_absl_handler().addFilter(_orbax_filter)
    sys.unraisablehook = unraisable_hook
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


class SavePolicy:
    """Decides when a save is due, by steps and by minutes; `clock` returns seconds."""

    def __init__(self, every_steps: int, every_minutes: float, clock: Callable[[], float]):
        self._steps, self._seconds, self._clock = every_steps, 60 * every_minutes, clock
        self._last, self._due = clock(), False

    @property
    def overdue(self) -> bool:
        """True when `every_minutes` have passed since the last save on this host (0: never)."""
        return 0 < self._seconds <= self._clock() - self._last

    def due(self, step: int, asked: bool) -> bool:
        """Return True when `every_steps` divides `step` (0: never) or a host `asked` for a save.

        A due save stays due until `saved` is called, so that a postponed save is not lost.
        """
        self._due |= asked or (self._steps > 0 and step % self._steps == 0)
        return self._due

    def saved(self) -> None:
        """Record a completed save and restart the timer."""
        self._last, self._due = self._clock(), False


def checkpoint_steps(workdir: str) -> list[int]:
    """Return the steps of the finished checkpoints in WORKDIR/checkpoints, in ascending order."""
    directory = epath.Path(object_storage.absolute(workdir)) / object_storage.CHECKPOINTS
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def checksum(x: jax.Array) -> jax.Array:
    """Return sum_i words[i] * (2 i + 1) modulo 2**32 as a uint32 scalar.

    Any single changed word alters it, since its odd weight is invertible modulo 2**32. An integer
    sum does not depend on the order of summation, hence not on how `x` is sharded.
    """
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


_all_checksums = jax.jit(lambda leaves: jnp.stack([checksum(x) for x in leaves]))


def checksums(tree: Any) -> dict[str, int]:
    """Return the checksum of each array of `tree`, keyed by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sums = np.asarray(_all_checksums([jnp.asarray(x) for _, x in leaves])).tolist()
    return dict(zip(paths, sums, strict=True))


def _verify(tree: Any, expected: Mapping[str, int]) -> None:
    actual = checksums(tree)
    if wrong := [path for path, number in actual.items() if expected.get(path) != number]:
        raise ValueError(
            f"{len(wrong)} of {len(actual)} arrays differ from what was saved, first {wrong[0]}"
        )


@contextlib.contextmanager
def translate_errors(kind: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise the errors of Orbax and tensorstore about files as `kind`, in one line."""
    try:
        yield
    except Exception as e:
        # Orbax wraps some errors in a plain Exception; other classes are not about files
        if type(e) is not Exception and not isinstance(
            e, OSError | ValueError | KeyError | TypeError | AttributeError
        ):
            raise
        raise kind(prefix + " ".join(str(e.__cause__ or e).split())[:300]) from e


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read or differs from what was saved."""


class PreservationPolicy(NamedTuple):
    """Keeps the newest `keep` checkpoints and all whose step `keep_every` divides (0: none).

    The newest `keep` whose step `every_steps` divides stay too: checkpoints that stopped runs add
    in between must not evict them.
    """

    keep: int
    keep_every: int
    every_steps: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each of `checkpoints`, oldest first, whether it stays; Orbax calls this."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        regular, milestones = (
            [step for step in steps if interval and step % interval == 0]
            for interval in (self.every_steps, self.keep_every)
        )
        preserved = {*steps[-self.keep :], *regular[-self.keep :], *milestones}
        return [step in preserved for step in steps]


class Checkpoints:
    """The checkpoints of a run, in WORKDIR/checkpoints/STEP; saves are asynchronous and atomic."""

    def __init__(self, workdir: str, keep: int, keep_every: int = 0, every_steps: int = 0):
        _silence_orbax()
        self._workdir, self._every_steps = workdir, every_steps
        self._manager = ocp.CheckpointManager(
            f"{object_storage.absolute(workdir)}/{object_storage.CHECKPOINTS}",
            item_names=(STATE, CHECKSUMS),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=PreservationPolicy(keep, keep_every, every_steps),
                create=True,
                cleanup_tmp_directories=True,  # partial saves of a killed run
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Start to save `state`; do nothing if this step is saved already.

        Raises UserError (RetryableError in object storage) if the previous save failed.
        """
        if step == self._manager.latest_step():
            return
        sums = checksums(state)
        items = {STATE: ocp.args.StandardSave(state), CHECKSUMS: ocp.args.JsonSave(sums)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def check(self) -> None:
        """Raise UserError if a save that was started has failed."""
        with self._writing():
            self._manager.check_for_errors()

    def restore(self, state: Any, shardings: Any, before: int | None = None) -> Any:
        """Return the newest intact state, as arrays with `shardings`.

        `state` gives shapes and dtypes (abstract arrays). With `before`, only steps below it are
        considered, those that `every_steps` divides first: a run that was stopped and saved in
        between then rolls back to the same step as a run that was not. Damaged checkpoints are
        reported and, once an intact one has been read, moved to WORKDIR/damaged.

        Raises UserError if no checkpoint is left, RetryableError if one of several hosts could not
        read its part.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if before is not None:
            steps = [step for step in steps if step < before]
            if self._every_steps:
                steps.sort(key=lambda step: step % self._every_steps != 0)  # regular steps first
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._read(step, target, others=len(steps) > len(damaged) + 1)
            except DamagedCheckpoint as e:
                damaged[step] = str(e)
                print(f"checkpoint {step} is damaged: {e}", flush=True)
                continue
            for damaged_step in damaged if jax.process_index() == 0 else ():
                self._move(damaged_step)
            if damaged:
                multihost_utils.sync_global_devices("set aside")
                self._manager.reload()
            return restored
        if not damaged:
            raise UserError(
                f"{self._workdir}/checkpoints has no checkpoint before step {before} to roll back "
                "to: save more often (checkpoint.every_steps) or keep more (checkpoint.keep)"
            )
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {self._workdir}/checkpoints can be used "
            f"({'; '.join(f'{step}: {why}' for step, why in damaged.items())}); nothing was "
            "changed. Bring back a copy of one, or start again in another workdir"
        )

    def _read(self, step: int, target: Any, others: bool) -> Any:
        """Restore and verify `step`; `others` says that older checkpoints could be tried next."""
        items = {STATE: ocp.args.StandardRestore(target), CHECKSUMS: ocp.args.JsonRestore()}
        try:
            with translate_errors(DamagedCheckpoint):
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except DamagedCheckpoint as e:
            if jax.process_count() == 1 or not others:
                raise
            # other hosts may have read their parts and wait for this one: all must start again
            self._move(step)
            raise RetryableError(f"checkpoint {step} is damaged: {e}; it was set aside") from e
        # outside of the block above: a checksum fails on all hosts alike, without a restart
        with translate_errors(DamagedCheckpoint):
            _verify(restored[STATE], restored[CHECKSUMS])
        return restored[STATE]

    def _move(self, step: int) -> None:
        workdir = epath.Path(object_storage.absolute(self._workdir))
        target = workdir / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another host moved it first
            (workdir / object_storage.CHECKPOINTS / str(step)).rename(target)
            print(f"moved it to {target}", flush=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise a failed save as UserError, or as RetryableError in object storage."""
        try:
            with translate_errors(OSError):
                yield
        except OSError as e:
            remote = object_storage.is_remote(self._workdir)
            last = max(checkpoint_steps(self._workdir), default="none")
            raise (RetryableError if remote else UserError)(
                f"a checkpoint could not be written to {self._workdir}/checkpoints: {e}; step of "
                f"the last intact one: {last}. {'R' if remote else 'Make room and r'}un the same "
                "command again"
            ) from e

    def forget(self, above: int) -> None:
        """Delete the checkpoints of steps above `above`, which a rollback has abandoned."""
        for step in self._manager.all_steps():
            if step > above:
                self._manager.delete(step)

    def wait(self) -> None:
        """Wait until every save is on disk. Raises UserError if one has failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for every save, as `wait` does, and release the manager's threads."""
        self.wait()
        self._manager.close()


def read_arrays(directory: str, step: int, moments: bool) -> dict[str, Any]:
    """Return the verified state of a checkpoint in `directory` as nested dicts of numpy arrays.

    It has `params` and, with `moments`, `opt_state` reduced to Adam's `mu` and `nu`; shapes need
    not be known beforehand. Raises UserError if the checkpoint cannot be read.
    """
    handlers = {STATE: ocp.PyTreeCheckpointHandler(), CHECKSUMS: ocp.JsonCheckpointHandler()}
    manager = ocp.CheckpointManager(os.path.abspath(directory), item_handlers=handlers)
    prefix = f"{directory}/{step} cannot be read: "
    with contextlib.closing(manager) as reader, translate_errors(UserError, prefix):
        request = _partial_restore(reader.item_metadata(step)[STATE], moments)
        items = {STATE: request, CHECKSUMS: ocp.args.JsonRestore()}
        restored = reader.restore(step, args=ocp.args.Composite(**items))
        _verify(restored[STATE], restored[CHECKSUMS])
    return restored[STATE]


def _partial_restore(metadata: Any, moments: bool) -> ocp.args.PyTreeRestore:
    """Request the parameters and, with `moments`, Adam's moments as numpy arrays."""
    request = {"params": metadata["params"]}
    if moments:
        request["opt_state"] = [
            {key: part[key] for key in ("mu", "nu")} if part and "mu" in part else None
            for part in metadata["opt_state"] or ()
        ]
    arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        request,
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    return ocp.args.PyTreeRestore(request, restore_args=arguments, partial_restore=True)
