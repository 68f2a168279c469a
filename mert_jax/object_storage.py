"""Workdirs in object storage, gs://BUCKET/PATH: a local copy of all but their checkpoints.

Orbax writes checkpoints there and ArrayRecord reads datasets there without help. Everything else in
a workdir is small and grows by lines, which objects cannot: it is kept in a local folder, whose
files are copied whole when they have changed. Needs the extra [gcs].
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from mert_jax.errors import UserError

SCHEME = "gs://"
OWNER = "owner"  # holds a word of the run that was the last to start there
CHECKPOINTS, LOCK = "checkpoints", "lock"


def is_remote(path: str) -> bool:
    """Whether `path` is in object storage."""
    return path.startswith(SCHEME)


def absolute(path: str) -> str:
    """`path` without a dependence on where this process runs."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def bucket() -> Any:
    """The file system of gs://; UserError without the extra."""
    try:
        import gcsfs
    except ImportError as e:
        raise UserError(f"{SCHEME} needs an extra: pip install -e .[gcs] ({e})") from e
    return gcsfs.GCSFileSystem(use_listings_cache=False)


@contextlib.contextmanager
def translate_errors(kind: type[UserError], path: str, todo: str) -> Iterator[None]:
    """Whatever the network, the service and the credentials answer, as a `kind` of one line."""
    import aiohttp
    import gcsfs
    import google.auth.exceptions as auth

    try:
        yield
    except (OSError, aiohttp.ClientError, gcsfs.retry.HttpError, auth.GoogleAuthError) as e:
        said = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, FileNotFoundError | PermissionError):  # as it will be the next time
            kind, todo = UserError, "check its name and your credentials"
        raise kind(f"{path} cannot be reached: {said[:300]}; {todo}") from e


def fetch(source: Any, path: str, folder: str, step: int | None) -> None:
    """Copy what lies at `path` to `folder`, and of its checkpoints that of `step`."""
    root = absolute(path).removeprefix(SCHEME)
    for name in source.find(root):
        name = name.removeprefix(f"{root}/")
        kept = name.startswith(f"{CHECKPOINTS}/{step}/") or not name.startswith(f"{CHECKPOINTS}/")
        if kept and name != OWNER and not name.endswith("/"):
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            source.get_file(f"{root}/{name}", target)


@contextlib.contextmanager
def fetched(path: str, steps: Callable[[str], list[int]]) -> Iterator[str]:
    """`path`, or a local copy of what lies there in object storage: a file, a folder, or a workdir
    with the newest of its checkpoints (`steps` of a workdir) or the one that is named
    (WORKDIR/checkpoints/STEP)."""
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
                step = int(named) if named else max(steps(root), default=None)
                fetch(source, root, target, step)
            else:
                raise UserError(f"{path} does not exist")
        yield os.path.join(target, CHECKPOINTS, named) if named else target
