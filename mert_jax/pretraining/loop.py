"""The loop over updates that pretraining and codec training share."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from mert_jax.checkpoints.manager import Checkpoints
from mert_jax.files import Row
from mert_jax.pretraining.metrics import Speed, Writer
from mert_jax.pretraining.run_log import SAVE, BadStreak, StepDecision
from mert_jax.runtime.goodput import Goodput
from mert_jax.runtime.signals import StopSignal


class Intervals(NamedTuple):
    """When a run ends, logs, evaluates and saves, in steps (and minutes; 0: never)."""

    total_steps: int
    log_every: int
    eval_every: int
    save_every_steps: int
    save_every_minutes: float


class Trainer(Protocol):
    """The model in training, as the loop sees it; states, batches and results are its own."""

    def next_batch(self, state: Any) -> int:
        """Return the number of the next batch."""

    def batches(self, start: int) -> Iterator[Any]:
        """Return batches `start`, `start` + 1, ..., without end."""

    def update(self, state: Any, batch: Any, request: int) -> tuple[Any, Any]:
        """Make one update; `request` is SAVE, the number of a signal, or 0."""

    def decide(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        """Judge the steps so far, and return the strongest request of any host."""

    def roll_back(self, state: Any, streak: BadStreak) -> Any:
        """Return an earlier state to continue from; needed only if `decide` returns streaks."""

    def may_save(self, result: Any) -> bool:
        """Return False within a streak of bad steps, whose states must not replace good ones."""

    def row(self, step: int, state: Any, result: Any, evaluate: bool) -> Row:
        """Return the metrics of a step, and of the validation split on request."""

    def line(self, row: Row, eta: str) -> str:
        """Return the console line of a row."""


class Saver:
    """Saves states by steps and minutes, and leaves the time that this takes out of the speed.

    `before` is called ahead of each save, to write what a checkpoint relies on.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        intervals: Intervals,
        clock: Goodput,
        speed: Speed,
        before: Callable[[], None],
    ):
        self.checkpoints, self._clock, self._speed = checkpoints, clock, speed
        self._steps, self._seconds = intervals.save_every_steps, 60 * intervals.save_every_minutes
        self._before, self._last, self._due = before, time.monotonic(), False

    @property
    def overdue(self) -> bool:
        """True once the minutes between saves have passed, by this host's clock."""
        return 0 < self._seconds <= time.monotonic() - self._last

    def due(self, step: int, requested: bool) -> bool:
        """Return True from the time a save is due or requested until it is made."""
        self._due |= requested or (self._steps > 0 and step % self._steps == 0)
        return self._due

    def save(self, step: int, state: Any) -> None:
        with self._clock.time_of("save"):
            self._before()
            self.checkpoints.save(step, state)
        self._clock.saved(step)
        self._last, self._due = time.monotonic(), False
        self._speed.pause()


def run(
    trainer: Trainer,
    state: Any,
    intervals: Intervals,
    saver: Saver,
    clock: Goodput,
    speed: Speed,
    writer: Writer,
    publish: Callable[[int], None],
    beat: Callable[[], None],
) -> tuple[Any, int]:
    """Train from `state` to `total_steps` or a stop request; return the last state and the signal.

    `publish` is called after each row, and `beat` before each step. The signal is 0 for a finished
    run; the last state is saved in either case.
    """
    step, next_batch = int(state.step), trainer.next_batch(state)
    stop, stopping = StopSignal(), False
    stream, kind = trainer.batches(next_batch), "compile"  # which the first step does
    clock.begin(step)
    while step < intervals.total_steps and not stopping:
        beat()
        saver.checkpoints.check()
        with clock.time_of("data_wait"):
            batch = next(stream)
        with clock.time_of(kind):
            request = stop.signal or (SAVE if saver.overdue else 0)
            state, result = trainer.update(state, batch, request)
        step, next_batch, kind = step + 1, next_batch + 1, "step"
        last = step == intervals.total_steps
        decision = trainer.decide(step, next_batch - 1, result, last)
        if decision.streak:
            state = trainer.roll_back(state, decision.streak)
            step, next_batch = int(state.step), trainer.next_batch(state)
            stream.close()
            stream = trainer.batches(next_batch)
            writer.back_to(step)
            speed.pause()
            continue
        stopping = decision.request > SAVE  # the number of a signal
        evaluate = step % intervals.eval_every == 0 or last
        if step % intervals.log_every == 0 or evaluate:
            row = trainer.row(step, state, result, evaluate)
            writer.write(row)
            publish(step)
            print(trainer.line(row, speed.eta(step)), flush=True)
        due = saver.due(step, decision.request == SAVE)
        if last or stopping or (due and trainer.may_save(result)):
            saver.save(step, state)
    stream.close()
    with clock.time_of("save"):
        saver.checkpoints.wait()
    writer.close()
    finished = step >= intervals.total_steps
    return state, 0 if finished else decision.request
