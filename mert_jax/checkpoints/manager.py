"""Saves and restores checkpoints, verified by checksums; the only module that imports Orbax."""

import contextlib
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mert_jax.checkpoints import object_storage
from mert_jax.constants import CHECKPOINTS
from mert_jax.errors import RetryableError, UserError


@functools.cache  # once a process
def _silence_orbax() -> None:
    """Leave the report of a failed save to the exception it raises; Orbax's threads log it too."""

    def keep(record: Any) -> bool:
        from_orbax = "orbax" in record.pathname or record.name == "asyncio"
        return not (from_orbax and record.exc_info)

    def unraisable_hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # by a failed save
            sys.__unraisablehook__(unraisable)

    absl.logging.get_absl_handler().addFilter(keep)
    sys.unraisablehook = unraisable_hook
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)


@contextlib.contextmanager
def _translate_errors(kind: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise any error about files as one line of `kind`."""
    try:
        yield
    except RuntimeError:  # not about files, such as a device without memory
        raise
    except Exception as e:  # damaged files make Orbax raise nearly anything
        raise kind(prefix + " ".join(str(e.__cause__ or e).split())[:300]) from e


def checkpoint_steps(workdir: str) -> list[int]:
    """Return the steps of the finished checkpoints in WORKDIR/checkpoints, in ascending order."""
    directory = epath.Path(object_storage.absolute(workdir)) / CHECKPOINTS
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


def _verified(restored: Any) -> Any:
    """Return the state of a restored checkpoint. Raises ValueError if its checksums differ."""
    actual, expected = checksums(restored["default"]), restored["checksums"]
    if wrong := [path for path in actual if expected.get(path) != actual[path]]:
        raise ValueError(f"{len(wrong)} of {len(actual)} arrays have changed, first {wrong[0]}")
    return restored["default"]


class Checkpoints:
    """The checkpoints of a run, in WORKDIR/checkpoints/STEP; saves are asynchronous and atomic.

    The `keep` newest stay, those whose step `keep_every` divides (0: none), and the `keep` newest
    whose step `every_steps` divides: the saves of stopped runs must not evict them. Methods raise
    UserError (RetryableError in object storage) if a save has failed.
    """

    def __init__(self, workdir: str, keep: int, keep_every: int = 0, every_steps: int = 0):
        _silence_orbax()
        self._workdir, self._every_steps = workdir, every_steps
        self._keep, self._keep_every = keep, keep_every
        self._manager = ocp.CheckpointManager(
            f"{object_storage.absolute(workdir)}/{CHECKPOINTS}",
            item_names=("default", "checksums"),
            # a killed run leaves temporary directories
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self, cleanup_tmp_directories=True
            ),
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each of `checkpoints`, oldest first, whether it stays; Orbax calls this."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        regular = [x for x in steps if self._every_steps and x % self._every_steps == 0]
        milestones = [x for x in steps if self._keep_every and x % self._keep_every == 0]
        preserved = {*steps[-self._keep :], *regular[-self._keep :], *milestones}
        return [step in preserved for step in steps]

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _translate_errors(OSError):
                yield
        except OSError as e:
            remote = object_storage.is_remote(self._workdir)
            kind, todo = (RetryableError, "run") if remote else (UserError, "make room and run")
            last = max(checkpoint_steps(self._workdir), default="none")
            failed = f"a checkpoint could not be written to {self._workdir}/checkpoints: {e}"
            todo = f"step of the last intact one: {last}; {todo} the same command again"
            raise kind(f"{failed}; {todo}") from e

    def save(self, step: int, state: Any) -> None:
        """Start to save `state`; do nothing if this step is saved already."""
        if step != self._manager.latest_step():
            sums = ocp.args.JsonSave(checksums(state))
            items = ocp.args.Composite(default=ocp.args.StandardSave(state), checksums=sums)
            with self._writing():
                self._manager.save(step, args=items)

    def check(self) -> None:
        """Raise the error of a save that was started."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until every save is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for every save, and release the manager's threads."""
        self.wait()
        self._manager.close()

    def forget(self, above: int) -> None:
        """Delete the checkpoints of steps above `above`, which a rollback has abandoned."""
        for step in self._manager.all_steps():
            if step > above:
                self._manager.delete(step)

    def restore(self, state: Any, shardings: Any, before: int | None = None) -> Any:
        """Return the newest intact state, with the shapes of `state` (abstract) and `shardings`.

        With `before`, only steps below it are tried, those that `every_steps` divides first: a run
        that was stopped then rolls back to the same step as another. Damaged checkpoints are moved
        to WORKDIR/damaged. Raises UserError if none is left, RetryableError if a host failed.
        """
        struct = jax.ShapeDtypeStruct
        target = jax.tree.map(lambda x, s: struct(x.shape, x.dtype, sharding=s), state, shardings)
        self.wait()
        every = self._every_steps if before is not None else 0
        steps = [step for step in self._manager.all_steps() if before is None or step < before]
        steps.sort(key=lambda step: (every > 0 and step % every > 0, -step))
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._read(step, target, last=step == steps[-1])
            except OSError as e:
                damaged[step] = str(e)
                print(f"checkpoint {step} is damaged: {e}", flush=True)
                continue
            if damaged:
                for damaged_step in damaged if jax.process_index() == 0 else ():
                    self._move(damaged_step)
                multihost_utils.sync_global_devices("set aside")
                self._manager.reload()
            return restored
        reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items()) or "there is none"
        limit = "" if before is None else f" before step {before}"
        missing = f"{self._workdir}/checkpoints has no intact checkpoint{limit} ({reasons})"
        way_out = "Bring one back, or begin another workdir with a larger checkpoint.keep"
        raise UserError(f"{missing}; nothing was changed. {way_out}")

    def _read(self, step: int, target: Any, last: bool) -> Any:
        """Restore and verify `step`, the `last` to try. Raises OSError if it is damaged."""
        sums = ocp.args.JsonRestore()
        items = ocp.args.Composite(default=ocp.args.StandardRestore(target), checksums=sums)
        try:
            with _translate_errors(OSError):
                restored = self._manager.restore(step, args=items)
        except OSError as e:
            if jax.process_count() == 1 or last:
                raise
            # other hosts may have read their parts and wait for this one: all must start again
            self._move(step)
            raise RetryableError(f"checkpoint {step} is damaged: {e}; it was set aside") from e
        # outside of the block above: a checksum fails on all hosts alike, without a restart
        with _translate_errors(OSError):
            return _verified(restored)

    def _move(self, step: int) -> None:
        folder = self._manager.directory.parent / "damaged"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        with contextlib.suppress(FileNotFoundError):  # another host moved it first
            (self._manager.directory / str(step)).rename(target)
            print(f"moved it to {target}", flush=True)


def read_arrays(directory: str, step: int, moments: bool) -> dict[str, Any]:
    """Return the verified `params` and, on request, Adam's `mu` and `nu` as nested numpy arrays."""
    handlers = dict(default=ocp.PyTreeCheckpointHandler(), checksums=ocp.JsonCheckpointHandler())
    manager = ocp.CheckpointManager(os.path.abspath(directory), item_handlers=handlers)
    prefix = f"{directory}/{step} cannot be read: "
    with contextlib.closing(manager), _translate_errors(UserError, prefix):
        metadata = manager.item_metadata(step)["default"]
        request = {"params": metadata["params"]}
        if moments:
            request["opt_state"] = [
                dict(mu=part["mu"], nu=part["nu"]) if part and "mu" in part else None
                for part in metadata["opt_state"] or ()
            ]
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), request)
        state = ocp.args.PyTreeRestore(request, restore_args=as_numpy, partial_restore=True)
        items = ocp.args.Composite(default=state, checksums=ocp.args.JsonRestore())
        restored = _verified(manager.restore(step, args=items))
    adam = next(filter(None, restored.get("opt_state") or ()), {})
    return {"params": restored["params"], **adam}
