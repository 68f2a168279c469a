"""Files written whole or not at all, directory locks, and files of one JSON object a line."""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from mert_jax.errors import UserError

Row = dict[str, Any]


@contextlib.contextmanager
def atomic_write(path: str, replace: bool = False) -> Iterator[str]:
    """Yield a temporary path beside `path` for a file or directory, and rename it at the end.

    An exception leaves nothing behind. Raises UserError if `path` exists (unless `replace`) or
    cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    if os.path.exists(path) and not replace:
        raise UserError(f"{path} exists already; choose another output, or remove it first")
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        todo = "make room or choose another place, and run the command again"
        raise UserError(f"{path} cannot be written: {e}; {todo}") from e
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: str, content: Any) -> None:
    """Write `content` to the file `path`, replacing it whole or not at all."""
    with atomic_write(path, replace=True) as temporary, open(temporary, "w") as file:
        json.dump(content, file, indent=1)


@contextlib.contextmanager
def directory_lock(directory: str) -> Iterator[None]:
    """Make `directory` if needed and lock it. Raises UserError if another process has locked it."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            todo = "wait for it, or give another --output"
            raise UserError(f"another process is writing {directory}; {todo}") from None
        yield


def read_jsonl(path: str) -> list[Row]:
    """Return the rows of a file, [] if there is none, without a last line that a crash cut off."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path) as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise UserError(f"{path}: line {len(rows) + 1} is not JSON") from None
    return rows


def finite_or_none(value: Any) -> Any:
    """Replace each number that JSON cannot hold (NaN, infinity) by None, in lists too."""
    if isinstance(value, list):
        return [finite_or_none(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlFile:
    """Appends rows to `path` (None: nowhere) after dropping the rows that `keep` rejects."""

    def __init__(self, path: str | None, keep: Callable[[Row], bool]):
        self._path, self._file = path, None
        self.drop(keep)

    def drop(self, keep: Callable[[Row], bool]) -> None:
        """Rewrite the file with only the rows that `keep` accepts; do nothing if there is none."""
        self.close()
        if self._path and os.path.exists(self._path):
            rows = [row for row in read_jsonl(self._path) if keep(row)]
            with atomic_write(self._path, replace=True) as path, open(path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def write(self, row: Row) -> None:
        """Append a row and flush it. Raises UserError if the disk is full."""
        if self._path is None:
            return
        try:
            if self._file is None:
                self._file = open(self._path, "a")  # noqa: SIM115 (closed by close)
            self._file.write(json.dumps({k: finite_or_none(v) for k, v in row.items()}) + "\n")
            self._file.flush()
        except OSError as e:
            todo = "make room and run the same command again"
            raise UserError(f"{self._path} cannot be written: {e}; {todo}") from e

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
