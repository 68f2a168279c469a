"""When a run saves."""

from unittest import mock

import pytest

from mert_jax.pretraining import loop


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to, in the first entry of a list."""
    now = [1000.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    return now


def saver(every_steps: int, every_minutes: float) -> loop.Saver:
    intervals = loop.Intervals(100, 1, 1, every_steps, every_minutes)
    return loop.Saver(mock.Mock(), intervals, mock.MagicMock(), mock.Mock(), mock.Mock())


def saves(saver: loop.Saver, steps, clock: list[float]) -> list[int]:
    """Return those of `steps`, 50 s each, after which a training loop saves."""
    saved = []
    for step in steps:
        clock[0] += 50
        if saver.due(step, saver.overdue):
            saver.save(step, None)
            saved.append(step)
    return saved


def test_saves_by_steps(clock):
    assert saves(saver(3, 0), range(1, 10), clock) == [3, 6, 9]


def test_saves_by_minutes_since_the_last_save_of_either_kind(clock):
    # 150 s: by minutes; step 100: by steps, from where two minutes count anew
    assert saves(saver(100, 2.0), range(97, 105), clock) == [99, 100, 103]


def test_a_postponed_save_stays_due(clock):
    postponed = saver(3, 0)
    assert [postponed.due(step, step == 7) for step in range(1, 6)] == [False] * 2 + [True] * 3
    postponed.save(5, None)
    assert [postponed.due(step, step == 7) for step in (7, 8)] == [True] * 2


def test_zero_never_saves(clock):
    never = saver(0, 0)
    clock[0] += 1e6
    assert not saves(never, range(1, 100), clock)
