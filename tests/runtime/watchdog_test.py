"""A run that does not move ends, with its stacks; one that does, does not."""

import subprocess
import sys
import threading
import time

import pytest

from mert_jax.errors import RESTART
from mert_jax.runtime import watchdog


def test_it_calls_once_without_a_beat():
    timed_out = threading.Event()
    with watchdog.Watchdog(0.05, timed_out.set):
        assert timed_out.wait(10)


def test_it_is_quiet_while_the_run_moves_and_after_it():
    timed_out = threading.Event()
    with watchdog.Watchdog(0.5, timed_out.set) as timer:
        for _ in range(15):
            time.sleep(0.05)
            timer.beat()
    time.sleep(0.6)
    assert not timed_out.is_set()


def test_0_never_times_out():
    with watchdog.Watchdog(0, lambda: pytest.fail("timed out")) as timer:
        timer.beat()


STALLED = """
import sys, time
from mert_jax.runtime import watchdog

def a_read_that_never_returns():
    time.sleep(600)

with watchdog.Watchdog(0.3, lambda: watchdog.end_stalled_run(sys.argv[1], 0, 0.3)):
    a_read_that_never_returns()
"""


def test_a_stall_leaves_the_stacks_of_all_threads_and_the_code_to_start_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STALLED, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == RESTART == 75
    for said in (done.stderr, (tmp_path / "stalled.0.txt").read_text()):
        assert "no progress for 0 s" in said
        assert "a_read_that_never_returns" in said
        assert "run the same command again" in said


def test_a_disk_that_takes_nothing_does_not_keep_it_from_ending(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STALLED, str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == RESTART
