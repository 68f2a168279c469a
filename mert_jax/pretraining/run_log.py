"""What a run writes down step by step, and what the steps say to do next."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.bad_records import BadRecords
from mert_jax.pretraining.bad_steps import BadSteps, BadStreak
from mert_jax.pretraining.metrics import Writer

LAG = 1  # steps between the newest and the one whose verdict is waited for
SAVE = 1  # a host's wish; a larger one is the signal that asks it to stop


class StepDecision(NamedTuple):
    """What to do after a step: give up a course of bad steps, fulfil the largest of the hosts'
    wishes (0: there is none)."""

    course: BadStreak | None
    wish: int


class RunLog:
    """Metrics, updates that were not made, and records that could not be used.

    Steps are looked at `LAG` steps late, so that the devices need not wait, and by all hosts alike,
    so that they do the same; the first host writes. `step` and `batch` are those the run begins
    with: lines of later ones are dropped.
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

    def note(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        """Remember `step`'s result, and look at those before it; at all of them where it is the
        `last` one or a host wishes to stop. Raises UserError where too many clips are faulty."""
        self._waiting.append((step, batch, result))
        wish = 0
        while len(self._waiting) > (0 if last or wish > SAVE else LAG):
            step, batch, result = self._waiting.popleft()
            notes = {name: np.asarray(x) for name, x in result["notes"].items()}
            wish = max(wish, int(notes["wishes"].max()))
            self._replaced.note(step, batch, notes)
            if course := self._skipped.note(step, batch, result):
                self._waiting.clear()  # of the same course
                return StepDecision(course, wish)
        return StepDecision(None, wish)

    def write(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self._metrics:
            self._metrics.write(row)

    def back_to(self, step: int) -> None:
        """Drop the metrics after `step`, which will come again."""
        if self._metrics:
            self._metrics.back_to(step)

    def close(self) -> None:
        """Close the files."""
        self._skipped.close()
        self._replaced.close()
        if self._metrics:
            self._metrics.close()
