"""Every second goes to one kind, over all processes that worked on a workdir."""

import pytest

from mert_jax.runtime import goodput


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def work(workdir, clock, begin, steps, save_at=(), seconds=10.0):
    """A process that does `steps` steps from `begin` and is killed after its last line."""
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
    found = work(tmp_path, clock, 0, 4, save_at=(2,))
    found.pop("unsaved")
    assert found == dict.fromkeys(goodput.KINDS, 0.0) | dict(
        other=1, restore=2, data_wait=2, step=40, save=3
    )
    assert sum(found.values()) == clock.now - 50


def test_what_a_killed_process_had_not_saved_is_lost(tmp_path):
    clock = Clock()
    work(tmp_path, clock, 0, 5, save_at=(2,))
    found = work(tmp_path, clock, 2, 3, save_at=(5,))
    assert found["lost"] == pytest.approx(30)  # steps 3 to 5, done twice
    assert found["step"] == pytest.approx(50)
    assert found["restore"] == 4


def test_a_clean_end_loses_nothing(tmp_path):
    clock = Clock()
    work(tmp_path, clock, 0, 2, save_at=(2,))
    assert work(tmp_path, clock, 2, 2)["lost"] == 0


def test_steps_gone_back_from_are_lost(tmp_path):
    clock = Clock()
    good = goodput.Goodput(str(tmp_path), clock)
    good.begin(0)
    clock.now += 10
    good.saved(1)
    clock.now += 7
    good.went_back()
    clock.now += 5
    good.write(2)
    found = goodput.read_goodput(str(tmp_path))
    assert (found["step"], found["lost"]) == (15, 7)


def test_in_words(tmp_path):
    assert goodput.summary_line(goodput.read_goodput(str(tmp_path))) == "no time has been spent yet"
    said = goodput.summary_line(
        dict.fromkeys(goodput.KINDS, 0.0) | {"step": 2700, "data_wait": 900}
    )
    assert said == "time: 1.00 h, of which step 75.0 %, data wait 25.0 %"
