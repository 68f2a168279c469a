"""Seconds of a run by kind (compile, step, save, lost, ...), over all restarts of a workdir."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mert_jax import files

FILE = "goodput.json"
KINDS = ("compile", "step", "data_wait", "validation", "save", "restore", "other", "lost")


class Goodput:
    """Sums seconds by kind in WORKDIR/goodput.json.

    Time outside of `time_of` counts for "step" after `begin`, for "other" before; "lost" are steps
    that were not saved and had to be repeated.
    """

    def __init__(self, workdir: str, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock, self._last = os.path.join(workdir, FILE), clock, clock()
        self._kind, self._seconds = "other", read_goodput(workdir)
        self._saved, self._unsaved = 0, 0.0  # the last step saved, and seconds of steps since

    def begin(self, step: int) -> None:
        """Start at `step`; count the steps of the previous process beyond it as lost."""
        self._advance()
        last = self._seconds.pop("unsaved", {"step": 0})
        if last["step"] > step:
            share = (last["step"] - step) / max(last["step"] - last["saved"], 1)
            self._lose(min(share, 1.0) * last["seconds"])
        self._kind, self._saved, self._unsaved = "step", step, 0.0

    def _advance(self) -> None:
        now = self._clock()
        self._seconds[self._kind] += now - self._last
        self._unsaved += now - self._last if self._kind == "step" else 0.0
        self._last = now

    def _lose(self, seconds: float) -> None:
        self._seconds["step"] -= seconds
        self._seconds["lost"] += seconds

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
        self._lose(self._unsaved)
        self._unsaved = 0.0

    def saved(self, step: int) -> None:
        """Record a completed save of `step`."""
        self._advance()
        self._saved, self._unsaved = step, 0.0

    def write(self, step: int) -> None:
        self._advance()
        content = {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}
        content["unsaved"] = dict(step=step, saved=self._saved, seconds=round(self._unsaved, 3))
        files.write_json(self._path, content)


def read_goodput(workdir: str) -> dict[str, Any]:
    """Return the seconds of a workdir by kind, zeros if it has none, and its unsaved steps."""
    path = os.path.join(workdir, FILE)
    stored = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
    return dict.fromkeys(KINDS, 0.0) | stored


def summary_line(seconds: dict[str, Any]) -> str:
    """Return one line with the share of each kind, the largest first."""
    kinds = sorted((kind for kind in KINDS if seconds[kind] > 0), key=seconds.get, reverse=True)
    total = sum(seconds[kind] for kind in kinds)
    if not total:
        return "no time has been spent yet"
    shares = [f"{kind.replace('_', ' ')} {100 * seconds[kind] / total:.1f} %" for kind in kinds]
    return f"time: {total / 3600:.2f} h, of which {', '.join(shares)}"
