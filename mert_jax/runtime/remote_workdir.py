"""Local copy of a workdir in object storage, without its checkpoints."""

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
    """Context manager whose `folder` holds the files of `workdir`, without its checkpoints.

    A local workdir is its own folder. Of a remote one the folder is a copy; if this process
    `writes`, then `push`, `flush` and the end of the context upload its changes.
    """

    def __init__(self, workdir: str, writes: bool):
        self.workdir, self.folder = workdir, workdir
        self._remote, self._writes = is_remote(workdir), writes and is_remote(workdir)
        self._sent: dict[str, tuple[int, int]] = {}
        self._owner, self._error, self._closed = "", None, False
        # numbers of requested and of completed uploads
        self._requested, self._completed, self._change = 0, 0, threading.Condition()

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
        self._thread = threading.Thread(target=self._upload_on_request, name="mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._remote:
            return
        try:
            # upload the log of a failed run too, unless the upload is what failed
            if self._error is None:
                self.flush()
        finally:
            with self._change:
                self._closed = True
                self._change.notify_all()
            self._thread.join()
            self._temporary.cleanup()

    def take(self) -> None:
        """Claim the workdir; the next upload of any other run fails."""
        if self._writes:
            self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"
            with translate_errors(UserError, self.workdir, "check that you may write there"):
                self._bucket.pipe_file(f"{absolute(self.workdir)}/{OWNER}", self._owner.encode())

    def push(self) -> None:
        """Start to upload changed files, or raise the error of an earlier upload.

        RetryableError: network; UserError: another run has claimed the workdir.
        """
        if self._error:
            raise self._error
        if self._writes:
            with self._change:
                self._requested += 1
                self._change.notify_all()

    def flush(self) -> None:
        """Upload changed files and wait for it."""
        self.push()
        with self._change:
            self._change.wait_for(lambda: self._error or self._completed == self._requested)
        if self._error:
            raise self._error

    def _upload_on_request(self) -> None:
        while not (self._closed or self._error):
            with self._change:
                self._change.wait_for(lambda: self._closed or self._completed < self._requested)
                requested = self._requested
            try:
                if self._completed < requested:
                    with translate_errors(
                        RetryableError, self.workdir, "run the same command again"
                    ):
                        self._upload()
            except Exception as e:  # raised at the next push
                self._error = e
            with self._change:
                self._completed = requested
                self._change.notify_all()

    def _upload(self) -> None:
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
        """Return size and time of each file except the lock and hidden (unfinished) files."""
        files = {}
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(parent, name)
                if not name.startswith(".") and name != LOCK:
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(path)
                        key = os.path.relpath(path, self.folder)
                        files[key] = status.st_size, status.st_mtime_ns
        return files
