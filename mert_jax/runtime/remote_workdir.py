"""A workdir in object storage, as a local copy of all but its checkpoints."""

import contextlib
import os
import socket
import tempfile
import threading
import uuid

from mert_jax.errors import RetryableError, UserError
from mert_jax.object_storage import (
    LOCK,
    OWNER,
    absolute,
    bucket,
    fetch,
    is_remote,
    translate_errors,
)


class RemoteWorkdir:
    """`folder` holds the files of `workdir` but for its checkpoints, as a context manager.

    Of a local workdir it is the workdir itself. Of a remote one it is a copy; where this process
    `writes`, its changes go there with `push` and `flush` and at the end, and `take` stops any
    other run that writes there, the next time it does.
    """

    def __init__(self, workdir: str, writes: bool):
        self.workdir, self.folder = workdir, workdir
        self._remote, self._writes = is_remote(workdir), writes and is_remote(workdir)
        self._sent: dict[str, tuple[int, int]] = {}
        self._owner, self._error, self._over = "", None, False
        # copies that were asked for, and how many of them are made
        self._asked, self._made, self._change = 0, 0, threading.Condition()

    def __enter__(self) -> "RemoteWorkdir":
        if not self._remote:
            return self
        self._bucket = bucket()
        self._temporary = tempfile.TemporaryDirectory(prefix="mert_jax.")
        self.folder = os.path.join(self._temporary.name, os.path.basename(absolute(self.workdir)))
        os.makedirs(self.folder)
        todo = "check its name, and your credentials (gcloud auth application-default login)"
        with translate_errors(UserError, self.workdir, todo):
            fetch(self._bucket, self.workdir, self.folder, step=None)
        self._sent = self._files()
        self._thread = threading.Thread(target=self._copy_on_demand, name="mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._remote:
            return
        try:
            # what a run that failed has written explains why; unless that is what failed
            if self._error is None:
                self.flush()
        finally:
            with self._change:
                self._over = True
                self._change.notify_all()
            self._thread.join()
            self._temporary.cleanup()

    def take(self) -> None:
        """Make the workdir this process's own."""
        if self._writes:
            self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"
            with translate_errors(UserError, self.workdir, "check that you may write there"):
                self._bucket.pipe_file(f"{absolute(self.workdir)}/{OWNER}", self._owner.encode())

    def push(self) -> None:
        """Begin to copy what has changed; raises what was wrong with an earlier copy: Again for the
        network, UserError where another run has taken the workdir."""
        if self._error:
            raise self._error
        if self._writes:
            with self._change:
                self._asked += 1
                self._change.notify_all()

    def flush(self) -> None:
        """`push`, and wait until all is there."""
        self.push()
        with self._change:
            self._change.wait_for(lambda: self._error or self._made == self._asked)
        if self._error:
            raise self._error

    def _copy_on_demand(self) -> None:
        while not (self._over or self._error):
            with self._change:
                self._change.wait_for(lambda: self._over or self._made < self._asked)
                asked = self._asked
            try:
                if self._made < asked:
                    with translate_errors(
                        RetryableError, self.workdir, "run the same command again"
                    ):
                        self._copy()
            except Exception as e:  # raised where the run next asks for a copy
                self._error = e
            with self._change:
                self._made = asked
                self._change.notify_all()

    def _copy(self) -> None:
        root = absolute(self.workdir)
        owner = self._bucket.cat_file(f"{root}/{OWNER}").decode() if self._owner else ""
        if owner != self._owner:
            host, process, _ = owner.split()
            raise UserError(
                f"another run has taken {self.workdir} over (process {process} on {host}); this "
                "one stops, and its last steps are not in metrics.jsonl"
            )
        files = self._files()
        for name in files:
            if self._sent.get(name) != files[name]:
                self._bucket.put_file(os.path.join(self.folder, name), f"{root}/{name}")
        for name in self._sent.keys() - files.keys():
            self._bucket.rm_file(f"{root}/{name}")
        self._sent = files

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file but the lock, which is this machine's, and hidden ones, which
        are being written."""
        found = {}
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(parent, name)
                if not name.startswith(".") and name != LOCK:
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(path)
                        key = os.path.relpath(path, self.folder)
                        found[key] = status.st_size, status.st_mtime_ns
        return found
