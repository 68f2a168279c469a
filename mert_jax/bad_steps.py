"""What the guard did not let pass: which steps, on which records, and when to go back."""

import collections
import os
from typing import Any, NamedTuple

import numpy as np

from mert_jax.ledger import Ledger

FILE = "bad_steps.jsonl"
LAG = 2  # steps between the one that runs and the one whose verdict is waited for


class Course(NamedTuple):
    """A run of steps that were all bad: the first, and the batch after the last."""

    first_step: int
    next_batch: int


class BadSteps:
    """Looks at each step's verdict `LAG` steps late, so that the device need not wait, and writes
    the bad ones to WORKDIR/bad_steps.jsonl with the record ids of this host's rows.

    `start` is the batch the run begins with: lines of it and later ones are dropped.
    """

    def __init__(self, workdir: str, most: int, start: int = 0, host: int = 0):
        name = FILE if host == 0 else FILE.replace(".jsonl", f".{host}.jsonl")
        self._ledger = Ledger(os.path.join(workdir, name), lambda row: row["batch"] < start)
        self._most, self._waiting = most, collections.deque()

    def note(self, step: int, batch: int, result: Any, records: np.ndarray) -> Course | None:
        """Remember the verdict on `step`, and look at an older one: the course to give up, if as
        many as `most` in a row were bad."""
        self._waiting.append((step, batch, result, records))
        return self._look() if len(self._waiting) > LAG else None

    def flush(self) -> Course | None:
        """Look at all that is left."""
        while self._waiting:
            if found := self._look():
                return found
        return None

    def forget(self) -> None:
        """What is not looked at yet belongs to a course that was given up."""
        self._waiting.clear()

    def close(self) -> None:
        self._ledger.close()

    def _look(self) -> Course | None:
        step, batch, result, records = self._waiting.popleft()
        streak = int(result["guard"].streak)
        if not streak:
            return None
        frames = result["sums"].frames
        row = dict(
            step=step,
            batch=batch,
            loss=float(result["sums"].loss / frames),
            grad_norm=float(result["grad_norm"]),
            norm_limit=float(result["norm_limit"]),
            in_a_row=streak,
            records=np.asarray(records).tolist(),
        )
        self._ledger.write(row)
        print(
            f"step {step} skipped: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g} "
            f"(limit {row['norm_limit']:.4g}), {streak} in a row; its records are in {FILE}",
            flush=True,
        )
        return Course(step - streak + 1, batch + 1) if streak >= self._most else None
