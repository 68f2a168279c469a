"""The records that a run keeps of its steps, and the decisions that follow from them."""

import collections
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.bad_records import BadRecords
from mert_jax.files import JsonlFile
from mert_jax.pretraining.metrics import Writer

BAD_STEPS = "bad_steps.jsonl"
LAG = 1  # steps are judged this many steps late, so that the devices need not wait
SAVE = 1  # a host's request to save; a larger one is the number of the signal that stops it


class BadStreak(NamedTuple):
    """Consecutive rejected steps: the first of them, and the batch after the last."""

    first_step: int
    next_batch: int


class StepDecision(NamedTuple):
    """Roll back a streak of rejected steps, or honour the strongest host request (0: none)."""

    streak: BadStreak | None
    request: int


class RunLog:
    """Writes metrics, rejected updates and unreadable records of a run to its workdir.

    All hosts judge the same steps and come to the same decisions; the one that `writes` keeps the
    files. A run resumes at `step` and `batch`: lines of later ones are dropped. `streak` rejected
    steps in a row are rolled back.
    """

    def __init__(
        self,
        workdir: str,
        sources: Sequence[Any],
        *,
        streak: int,
        max_faulty: float,
        tensorboard: bool,
        step: int,
        batch: int,
        writes: bool,
    ):
        self._streak, self._metrics, self._bad_steps = streak, None, None
        if writes:
            self._metrics = Writer(workdir, step, tensorboard)
            path = os.path.join(workdir, BAD_STEPS)
            self._bad_steps = JsonlFile(path, lambda row: row["batch"] < batch)
        self._bad_records = BadRecords(workdir, sources, max_faulty, batch, writes)
        self._waiting: collections.deque[tuple[int, int, Any]] = collections.deque()

    def decide(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        """Add the result of `step`, then judge the steps before it.

        All steps are judged if this is the `last` one or a host asks to stop. Raises UserError if
        too many clips had to be replaced.
        """
        self._waiting.append((step, batch, result))
        request = 0
        while len(self._waiting) > (0 if last or request > SAVE else LAG):
            step, batch, result = self._waiting.popleft()
            notes = {name: np.asarray(x) for name, x in result["notes"].items()}
            request = max(request, int(notes["requests"].max()))
            self._bad_records.note(step, batch, notes)
            if streak := self._note_rejected(step, batch, result):
                self._waiting.clear()  # of the same streak
                return StepDecision(streak, request)
        return StepDecision(None, request)

    def _note_rejected(self, step: int, batch: int, result: Any) -> BadStreak | None:
        """Record a rejected step. Return the streak if it completes one."""
        streak = int(result["guard"].streak)
        if not streak:
            return None
        row = dict(
            step=step,
            batch=batch,
            loss=float(result["sums"].loss / result["sums"].frames),
            grad_norm=float(result["grad_norm"]),
            norm_limit=float(result["norm_limit"]),
            in_a_row=streak,
            records=np.asarray(result["notes"]["record"]).tolist(),
        )
        if self._bad_steps:
            self._bad_steps.write(row)
        print(
            f"step {step} skipped: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g} "
            f"(limit {row['norm_limit']:.4g}), {streak} in a row; its records are in {BAD_STEPS}",
            flush=True,
        )
        return BadStreak(step - streak + 1, batch + 1) if streak >= self._streak else None

    def write(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self._metrics:
            self._metrics.write(row)

    def back_to(self, step: int) -> None:
        """Drop the metrics after `step`, which will be computed again."""
        if self._metrics:
            self._metrics.back_to(step)

    def close(self) -> None:
        """Close the files."""
        for file in (self._bad_steps, self._bad_records, self._metrics):
            if file:
                file.close()
