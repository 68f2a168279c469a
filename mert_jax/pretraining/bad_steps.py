"""The updates that the guard rejected, with their records, and streaks of them."""

import os
from typing import Any, NamedTuple

import numpy as np

from mert_jax.files import JsonlFile

FILE = "bad_steps.jsonl"


class BadStreak(NamedTuple):
    """Consecutive rejected steps: the first, and the batch after the last."""

    first_step: int
    next_batch: int


class BadSteps:
    """Writes rejected steps to WORKDIR/bad_steps.jsonl, with the ids of their records.

    `start` is the batch that the run begins with: lines of it and later ones are dropped. All hosts
    watch for streaks of `most` steps; the host that `writes` keeps the file.
    """

    def __init__(self, workdir: str, most: int, start: int = 0, writes: bool = True):
        self._most, self._ledger = most, None
        if writes:
            self._ledger = JsonlFile(os.path.join(workdir, FILE), lambda row: row["batch"] < start)

    def note(self, step: int, batch: int, result: Any) -> BadStreak | None:
        """Return the streak that `step` completes, None while it has fewer than `most` steps."""
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
            records=np.asarray(result["notes"]["record"]).tolist(),
        )
        if self._ledger:
            self._ledger.write(row)
        print(
            f"step {step} skipped: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g} "
            f"(limit {row['norm_limit']:.4g}), {streak} in a row; its records are in {FILE}",
            flush=True,
        )
        return BadStreak(step - streak + 1, batch + 1) if streak >= self._most else None

    def close(self) -> None:
        """Close the file."""
        if self._ledger:
            self._ledger.close()
