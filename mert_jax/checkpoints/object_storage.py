"""Checkpoints and workdirs in object storage, gs://BUCKET/PATH. Needs the extra [gcs].

Orbax and ArrayRecord use gs:// themselves. The small files of a workdir, which grow by lines as
objects cannot, are kept in a local folder and copied when they change.
"""

import concurrent.futures
import contextlib
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mert_jax.constants import CHECKPOINTS, LOCK_FILE
from mert_jax.errors import RetryableError, UserError

SCHEME = "gs://"
NAME = "check its name, and your credentials (gcloud auth application-default login)"
OWNER = "owner"  # file with the identity of the last run to start in a workdir


def is_remote(path: str) -> bool:
    """Return True if `path` is in object storage."""
    return path.startswith(SCHEME)


def absolute(path: str) -> str:
    """Return `path` independent of the working directory."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def bucket() -> Any:
    """Return the file system of gs://. Raises UserError without the extra."""
    try:
        import gcsfs  # heavy, and optional
    except ImportError as e:
        raise UserError(f"{SCHEME} needs an extra: pip install -e .[gcs] ({e})") from e
    return gcsfs.GCSFileSystem(use_listings_cache=False)


@contextlib.contextmanager
def _translate_errors(path: str, todo: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Raise any error of the network, the service or the credentials as one line of `kind`."""
    import aiohttp  # heavy, and optional like gcsfs
    import gcsfs
    import google.auth.exceptions as auth

    try:
        yield
    except (OSError, aiohttp.ClientError, gcsfs.retry.HttpError, auth.GoogleAuthError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, FileNotFoundError | PermissionError):  # trying again would not help
            kind, todo = UserError, NAME
        raise kind(f"{path} cannot be reached: {reason[:300]}; {todo}") from e


def _download(source: Any, path: str, folder: str, step: int | str | None) -> None:
    """Copy the files at `path` to `folder`; of its checkpoints, only that of `step`."""
    root = absolute(path).removeprefix(SCHEME)
    for name in source.find(root):
        name = name.removeprefix(f"{root}/")
        wanted = name.startswith(f"{CHECKPOINTS}/{step}/") or not name.startswith(f"{CHECKPOINTS}/")
        if wanted and name != OWNER and not name.endswith("/"):
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            source.get_file(f"{root}/{name}", target)


@contextlib.contextmanager
def fetched(path: str, steps: Callable[[str], list[int]]) -> Iterator[str]:
    """Yield `path`, or a temporary copy if it is remote, of a workdir at its newest checkpoint."""
    if not is_remote(path):
        yield path
        return
    root, _, named = absolute(path).partition(f"/{CHECKPOINTS}/")
    source = bucket()
    with tempfile.TemporaryDirectory(prefix="mert_jax.") as temporary:
        target = os.path.join(temporary, os.path.basename(root))
        with _translate_errors(path, NAME):
            if source.isfile(root):
                source.get_file(root, target)
            elif source.isdir(root):
                _download(source, root, target, named or max(steps(root), default=None))
            else:
                raise UserError(f"{path} does not exist; {NAME}")
        yield os.path.join(target, CHECKPOINTS, named) if named else target


class WorkdirMirror:
    """Context manager whose `folder` is a local `workdir`, or a copy without its checkpoints.

    Changes to the copy of a remote workdir are uploaded if this process `writes`.
    """

    def __init__(self, workdir: str, writes: bool):
        self.workdir, self.folder = workdir, workdir
        self._writes, self._resources = writes and is_remote(workdir), contextlib.ExitStack()
        self._owner, self._sent = "", {}
        self._upload = concurrent.futures.Future()  # the one requested last
        self._upload.set_result(None)

    def __enter__(self) -> "WorkdirMirror":
        if not is_remote(self.workdir):
            return self
        self._bucket, enter = bucket(), self._resources.enter_context
        temporary = enter(tempfile.TemporaryDirectory(prefix="mert_jax."))
        self._uploader = enter(concurrent.futures.ThreadPoolExecutor(1, "upload"))
        self.folder = os.path.join(temporary, os.path.basename(absolute(self.workdir)))
        os.makedirs(self.folder)
        with _translate_errors(self.workdir, NAME):
            _download(self._bucket, self.workdir, self.folder, step=None)
        self._sent = self._files()
        return self

    def __exit__(self, *_: object) -> None:
        with self._resources:
            # upload the log of a failed run too, unless the upload is what failed
            if not (self._upload.done() and self._upload.exception()):
                self.flush()

    def claim(self) -> None:
        """Claim the workdir; the next upload of any other run fails."""
        if self._writes:
            self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4()}"
            with _translate_errors(self.workdir, "check that you may write there"):
                self._bucket.pipe_file(f"{absolute(self.workdir)}/{OWNER}", self._owner.encode())

    def push(self) -> None:
        """Start to upload changed files, or raise the error of an earlier upload."""
        if self._upload.done():
            self._upload.result()
        # in this order, since an upload may end in between
        if self._writes and (self._upload.running() or self._upload.done()):
            self._upload = self._uploader.submit(self._upload_changes)

    def flush(self) -> None:
        """Upload changed files and wait for it."""
        self.push()
        self._upload.result()

    def _upload_changes(self) -> None:
        with _translate_errors(self.workdir, "run the same command again", RetryableError):
            root = absolute(self.workdir)
            owner = self._bucket.cat_file(f"{root}/{OWNER}").decode() if self._owner else ""
            if owner != self._owner:
                host, process, _ = owner.split()
                other = f"another run has taken {self.workdir} over (process {process} on {host})"
                raise UserError(f"{other}; this one's last steps are not in metrics.jsonl")
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
        for path in Path(self.folder).rglob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.name != LOCK_FILE:
                    status = path.stat()
                    files[str(path.relative_to(self.folder))] = status.st_size, status.st_mtime_ns
        return files
