"""Local copy of a workdir in object storage, without its checkpoints."""

import concurrent.futures
import contextlib
import os
import socket
import tempfile
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
        self._owner = ""
        self._upload: concurrent.futures.Future | None = None  # the one requested last
        self._error: Exception | None = None

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
        self._uploader = concurrent.futures.ThreadPoolExecutor(1, "upload")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._remote:
            return
        try:
            # upload the log of a failed run too, unless the upload is what failed
            if self._error is None:
                self.flush()
        finally:
            self._uploader.shutdown()
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
        waits = self._upload and not (self._upload.running() or self._upload.done())
        if self._writes and not waits:
            self._upload = self._uploader.submit(self._upload_or_keep_error)

    def flush(self) -> None:
        """Upload changed files and wait for it."""
        self.push()
        if self._upload:
            self._upload.result()
        if self._error:
            raise self._error

    def _upload_or_keep_error(self) -> None:
        if self._error is None:
            try:
                with translate_errors(RetryableError, self.workdir, "run the same command again"):
                    self._upload_changes()
            except Exception as e:  # raised at the next push
                self._error = e

    def _upload_changes(self) -> None:
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
