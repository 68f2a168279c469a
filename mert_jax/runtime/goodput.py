"""Seconds of a run by kind (compile, step, save, lost, ...), over all restarts of a workdir."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from mert_jax import files

FILE = "goodput.json"
KINDS = ("compile", "step", "data_wait", "validation", "save", "restore", "other", "lost")


class Goodput:
    """Sums seconds by kind in WORKDIR/goodput.json.

    Time inside `time_of(kind)` counts for `kind`, other time for "step" after `begin` and for
    "other" before it; "lost" are steps that were not saved and had to be repeated.
    """

    def __init__(self, workdir: str, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock, self._last = os.path.join(workdir, FILE), clock, clock()
        self._kind, self._seconds = "other", read_goodput(workdir)
        self._saved, self._since = 0, 0.0

    def begin(self, step: int) -> None:
        """Start at `step`; count the steps of the previous process beyond it as lost."""
        self._advance()
        unsaved = self._seconds.pop("unsaved", {})
        if unsaved.get("step", 0) > step:
            share = (unsaved["step"] - step) / max(unsaved["step"] - unsaved["saved"], 1)
            lost = min(share, 1.0) * unsaved["seconds"]
            self._seconds["step"] -= lost
            self._seconds["lost"] += lost
        self._kind, self._saved, self._since = "step", step, 0.0

    def _advance(self) -> None:
        now = self._clock()
        self._seconds[self._kind] += now - self._last
        self._since += now - self._last if self._kind == "step" else 0.0
        self._last = now

    @contextlib.contextmanager
    def time_of(self, kind: str) -> Iterator[None]:
        """Count the time inside for `kind`."""
        self._advance()
        outside, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._advance()
            self._kind = outside

    def went_back(self) -> None:
        """Count the steps since the last save as lost."""
        self._advance()
        self._seconds["step"] -= self._since
        self._seconds["lost"] += self._since
        self._since = 0.0

    def saved(self, step: int) -> None:
        """Record a completed save of `step`."""
        self._advance()
        self._saved, self._since = step, 0.0

    def write(self, step: int) -> None:
        """Write the sums up to now."""
        self._advance()
        content = {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}
        content["unsaved"] = dict(step=step, saved=self._saved, seconds=round(self._since, 3))
        with files.atomic_write(self._path, replace=True) as path, open(path, "w") as f:
            json.dump(content, f, indent=1)


def read_goodput(workdir: str) -> dict[str, Any]:
    """Return the seconds of a workdir by kind, zeros if it has none, and its unsaved steps."""
    seconds = dict.fromkeys(KINDS, 0.0)
    path = os.path.join(workdir, FILE)
    if os.path.exists(path):
        with open(path) as f:
            seconds |= json.load(f)
    return seconds


def summary_line(seconds: dict[str, Any]) -> str:
    """Return one line with the share of each kind, the largest first."""
    kinds = {kind: seconds[kind] for kind in KINDS if seconds[kind] > 0}
    total = sum(kinds.values())
    if not total:
        return "no time has been spent yet"
    shares = sorted(kinds.items(), key=lambda item: -item[1])
    words = ", ".join(f"{kind.replace('_', ' ')} {100 * s / total:.1f} %" for kind, s in shares)
    return f"time: {total / 3600:.2f} h, of which {words}"
