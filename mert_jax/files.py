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
    """Yield a temporary path beside `path`, to write a file or make a directory at, and rename it.

    Leave nothing behind after an exception. Raises UserError if `path` exists (unless `replace`)
    or cannot be written.
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
        raise UserError(
            f"{path} cannot be written: {e}; make room or choose another place, and run the "
            "command again"
        ) from e
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def directory_lock(directory: str) -> Iterator[None]:
    """Make `directory` if needed and hold it for this process.

    Raises UserError if another process holds it, OSError if it cannot be made.
    """
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {directory}; wait for it, or give another --output"
            ) from None
        yield


def read_jsonl(path: str) -> list[Row]:
    """Return the rows of a file, [] if there is none, without a last line that a crash cut off.

    Raises UserError for any other line that is not JSON.
    """
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
    """Appends rows to `path`, flushing each, after dropping the rows that `keep` rejects."""

    def __init__(self, path: str, keep: Callable[[Row], bool]):
        self._path, self._file = path, None
        self.drop(keep)

    def drop(self, keep: Callable[[Row], bool]) -> None:
        """Rewrite the file with only the rows that `keep` accepts; do nothing if there is none."""
        self.close()
        if os.path.exists(self._path):
            rows = [row for row in read_jsonl(self._path) if keep(row)]
            with atomic_write(self._path, replace=True) as path, open(path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def write(self, row: Row) -> None:
        """Append a row. Raises UserError if the disk is full."""
        try:
            if self._file is None:
                self._file = open(self._path, "a")  # noqa: SIM115 (closed by close)
            self._file.write(json.dumps({k: finite_or_none(v) for k, v in row.items()}) + "\n")
            self._file.flush()
        except OSError as e:
            raise UserError(
                f"{self._path} cannot be written: {e}; make room and run the same command again"
            ) from e

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None
