"""Files of one JSON object a line, which a resumed run goes on with where its checkpoint was."""

import json
import math
import os
from collections.abc import Callable
from typing import Any

from mert_jax import atomic
from mert_jax.cli import UserError

Row = dict[str, Any]


def read(path: str) -> list[Row]:
    """The rows of a file, [] where there is none; a last line cut off by a crash is left out.
    Raises UserError for any other line that is not JSON."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path) as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise UserError(f"{path}: line {len(rows) + 1} is not JSON") from None
    return rows


def finite(value: Any) -> Any:
    """`value` with None for each number that is not finite: JSON has none of those."""
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Ledger:
    """Appends rows to `path`, each on the disk's way at once; rows that `keep` does not want are
    dropped first."""

    def __init__(self, path: str, keep: Callable[[Row], bool]):
        self._path, self._file = path, None
        self.drop(keep)

    def drop(self, keep: Callable[[Row], bool]) -> None:
        """Leave only the rows that `keep` wants; no file is made where there was none."""
        self.close()
        if os.path.exists(self._path):
            rows = [row for row in read(self._path) if keep(row)]
            with atomic.staged(self._path, replace=True) as path, open(path, "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def write(self, row: Row) -> None:
        """Append a row; UserError where the disk does not take it."""
        try:
            if self._file is None:
                self._file = open(self._path, "a")  # noqa: SIM115 (closed by close)
            self._file.write(json.dumps({k: finite(v) for k, v in row.items()}) + "\n")
            self._file.flush()
        except OSError as e:
            raise UserError(
                f"{self._path} cannot be written: {e}; make room and run the same command again"
            ) from e

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
