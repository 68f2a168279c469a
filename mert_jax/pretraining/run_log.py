"""The decisions that follow from a run's steps, and its log of rejected ones."""

import collections
import os
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.bad_records import BadRecords
from mert_jax.files import JsonlFile

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
    """Judges steps, and writes rejected updates and bad records to the workdir.

    All hosts come to the same decisions; the one that `writes` keeps the files. A resumed run drops
    the lines from batch `start` on. `streak` rejected steps in a row are rolled back.
    """

    def __init__(
        self, workdir: str, bad_records: BadRecords, streak: int, start: int, writes: bool
    ):
        self._streak, self._bad_records = streak, bad_records
        path = os.path.join(workdir, BAD_STEPS) if writes else None
        self._bad_steps = JsonlFile(path, lambda row: row["batch"] < start)
        self._waiting: collections.deque[tuple[int, int, Any]] = collections.deque()

    def decide(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        """Add the result of `step`; judge the steps before it, and itself if a host asks to stop.

        Raises UserError if too many clips had to be replaced.
        """
        self._waiting.append((step, batch, result))
        request = 0
        while len(self._waiting) > (0 if last or request > SAVE else LAG):
            step, batch, result = self._waiting.popleft()
            notes = {name: np.asarray(x) for name, x in result["notes"].items()}
            request = max(request, int(notes["requests"].max()))
            self._bad_records.note(step, batch, notes["faulty"])
            if in_a_row := int(result["guard"].streak):
                self._note_rejected(step, batch, in_a_row, result)
                if in_a_row >= self._streak:
                    self._waiting.clear()  # of the same streak
                    return StepDecision(BadStreak(step - in_a_row + 1, batch + 1), request)
        return StepDecision(None, request)

    def _note_rejected(self, step: int, batch: int, in_a_row: int, result: Any) -> None:
        loss = float(result["sums"].loss / result["sums"].frames)
        norm, limit = float(result["grad_norm"]), float(result["norm_limit"])
        numbers = dict(step=step, batch=batch, loss=loss, grad_norm=norm, norm_limit=limit)
        records = np.asarray(result["notes"]["record"]).tolist()
        self._bad_steps.write(numbers | dict(in_a_row=in_a_row, records=records))
        print(
            f"step {step} skipped: loss {loss:.4g}, gradient norm {norm:.4g} (limit {limit:.4g}), "
            f"{in_a_row} in a row; its records are in {BAD_STEPS}",
            flush=True,
        )

    def close(self) -> None:
        self._bad_steps.close()
        self._bad_records.close()
