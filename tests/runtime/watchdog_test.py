"""A stalled run ends with its stacks; a run with beats does not."""

import subprocess
import sys
import threading
import time

import pytest

from mert_jax.errors import RESTART
from mert_jax.runtime import watchdog


def test_on_timeout_is_called_without_a_beat():
    timed_out = threading.Event()
    with watchdog.watch(0.05, timed_out.set):
        assert timed_out.wait(10)


def test_on_timeout_is_not_called_between_beats_or_after_the_end():
    timed_out = threading.Event()
    with watchdog.watch(0.5, timed_out.set) as beat:
        for _ in range(15):
            time.sleep(0.05)
            beat()
    time.sleep(0.6)
    assert not timed_out.is_set()


def test_0_disables_the_watchdog():
    with watchdog.watch(0, lambda: pytest.fail("timed out")) as beat:
        beat()


STALLED = """
import sys, time
from mert_jax.runtime import watchdog

def a_read_that_never_returns():
    time.sleep(600)

with watchdog.watch(0.3, lambda: watchdog.end_stalled_run(sys.argv[1], 0, 0.3)):
    a_read_that_never_returns()
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_stalled_run_exits_with_the_stacks_of_all_threads(tmp_path, writable):
    workdir = tmp_path if writable else tmp_path / "nowhere"
    command = [sys.executable, "-c", STALLED, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == RESTART == 75
    for text in (done.stderr, *(file.read_text() for file in tmp_path.glob("stalled.0.txt"))):
        assert "no progress for 0 s" in text
        assert "a_read_that_never_returns" in text
        assert "run the same command again" in text
    assert (tmp_path / "stalled.0.txt").exists() == writable
