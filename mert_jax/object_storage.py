"""Paths in object storage, gs://BUCKET/PATH, and local copies of what is there.

Orbax and ArrayRecord read and write gs:// themselves. The other files of a workdir are small and
grow by lines, which objects cannot, so they are kept in a local folder and copied when they change.
Needs the extra [gcs].
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from mert_jax.errors import UserError

SCHEME = "gs://"
OWNER = "owner"  # file with the identity of the last run to start in a workdir
CHECKPOINTS, LOCK = "checkpoints", "lock"


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
def translate_errors(kind: type[UserError], path: str, todo: str) -> Iterator[None]:
    """Raise any error of the network, the service or the credentials as one line of `kind`."""
    import aiohttp  # heavy, and optional like gcsfs
    import gcsfs
    import google.auth.exceptions as auth

    try:
        yield
    except (OSError, aiohttp.ClientError, gcsfs.retry.HttpError, auth.GoogleAuthError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, FileNotFoundError | PermissionError):  # trying again would not help
            kind, todo = UserError, "check its name and your credentials"
        raise kind(f"{path} cannot be reached: {reason[:300]}; {todo}") from e


def fetch(source: Any, path: str, folder: str, step: int | None) -> None:
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
    """Yield `path`, or a temporary local copy if it is in object storage.

    A remote path is a file, a folder, WORKDIR/checkpoints/STEP, or a workdir, which is copied with
    its newest checkpoint only; `steps` lists the checkpoints of a workdir. Raises UserError.
    """
    if not is_remote(path):
        yield path
        return
    root, _, named = absolute(path).partition(f"/{CHECKPOINTS}/")
    source = bucket()
    with tempfile.TemporaryDirectory(prefix="mert_jax.") as temporary:
        target = os.path.join(temporary, os.path.basename(root))
        with translate_errors(UserError, path, "check its name and your credentials"):
            if source.isfile(root):
                source.get_file(root, target)
            elif source.isdir(root):
                fetch(source, root, target, int(named) if named else max(steps(root), default=None))
            else:
                raise UserError(f"{path} does not exist")
        yield os.path.join(target, CHECKPOINTS, named) if named else target
