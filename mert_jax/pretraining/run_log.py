"""The record of a run, step by step, and the decisions that follow from it."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.bad_records import BadRecords
from mert_jax.pretraining.bad_steps import BadSteps, BadStreak
from mert_jax.pretraining.metrics import Writer

LAG = 1  # steps are judged this many steps late, so that the devices need not wait
SAVE = 1  # a host's request to save; a larger one is the number of the signal that stops it


class StepDecision(NamedTuple):
    """Roll back a streak of rejected steps, or honour the strongest request of a host (0: none)."""

    streak: BadStreak | None
    request: int


class RunLog:
    """Records metrics, skipped updates, and records that could not be used.

    All hosts judge the same steps and come to the same decisions; the first host alone writes. The
    run begins with `step` and `batch`: lines of later ones are dropped.
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
        first: bool,
    ):
        self._metrics = Writer(workdir, step, tensorboard) if first else None
        self._skipped = BadSteps(workdir, streak, batch, first)
        self._replaced = BadRecords(workdir, sources, max_faulty, batch, first)
        self._waiting: collections.deque[tuple[int, int, Any]] = collections.deque()

    def decide(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        """Add `step`'s result, then judge the steps before it.

        All steps are judged if this is the `last` one or a host asks to stop. Raises UserError if
        too many clips had to be replaced.
        """
        self._waiting.append((step, batch, result))
        request = 0
        while len(self._waiting) > (0 if last or request > SAVE else LAG):
            step, batch, result = self._waiting.popleft()
            notes = {name: np.asarray(x) for name, x in result["notes"].items()}
            request = max(request, int(notes["requests"].max()))
            self._replaced.note(step, batch, notes)
            if streak := self._skipped.note(step, batch, result):
                self._waiting.clear()  # of the same streak
                return StepDecision(streak, request)
        return StepDecision(None, request)

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
        self._skipped.close()
        self._replaced.close()
        if self._metrics:
            self._metrics.close()
