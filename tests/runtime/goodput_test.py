"""Every second counts for one kind, over all processes of a workdir."""

import pytest

from mert_jax.runtime import goodput


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def work(workdir, clock, begin, steps, save_at=(), seconds=10.0):
    """Run `steps` steps from `begin` in a process that is killed afterwards."""
    good = goodput.Goodput(str(workdir), clock)
    clock.now += 1
    with good.time_of("restore"):
        clock.now += 2
    good.begin(begin)
    for number in range(begin + 1, begin + steps + 1):
        with good.time_of("data_wait"):
            clock.now += 0.5
        clock.now += seconds
        if number in save_at:
            with good.time_of("save"):
                clock.now += 3
            good.saved(number)
        good.write(number)
    return goodput.read_goodput(str(workdir))


def test_every_second_has_a_kind(tmp_path):
    clock = Clock()
    spent = work(tmp_path, clock, 0, 4, save_at=(2,))
    spent.pop("unsaved")
    assert spent == dict.fromkeys(goodput.KINDS, 0.0) | dict(
        other=1, restore=2, data_wait=2, step=40, save=3
    )
    assert sum(spent.values()) == clock.now - 50


def test_unsaved_steps_of_a_killed_process_are_lost(tmp_path):
    clock = Clock()
    work(tmp_path, clock, 0, 5, save_at=(2,))
    spent = work(tmp_path, clock, 2, 3, save_at=(5,))
    assert spent["lost"] == pytest.approx(30)  # steps 3 to 5, done twice
    assert spent["step"] == pytest.approx(50)
    assert spent["restore"] == 4


def test_a_clean_end_loses_nothing(tmp_path):
    clock = Clock()
    work(tmp_path, clock, 0, 2, save_at=(2,))
    assert work(tmp_path, clock, 2, 2)["lost"] == 0


def test_rolled_back_steps_are_lost(tmp_path):
    clock = Clock()
    good = goodput.Goodput(str(tmp_path), clock)
    good.begin(0)
    clock.now += 10
    good.saved(1)
    clock.now += 7
    good.went_back()
    clock.now += 5
    good.write(2)
    spent = goodput.read_goodput(str(tmp_path))
    assert (spent["step"], spent["lost"]) == (15, 7)


def test_summary_line(tmp_path):
    assert goodput.summary_line(goodput.read_goodput(str(tmp_path))) == "no time has been spent yet"
    seconds = dict.fromkeys(goodput.KINDS, 0.0) | {"step": 2700, "data_wait": 900}
    line = goodput.summary_line(seconds)
    assert line == "time: 1.00 h, of which step 75.0 %, data wait 25.0 %"
