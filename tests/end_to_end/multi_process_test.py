"""Several processes train like one."""

import os
import shutil
import signal

import numpy as np
import pytest

from mert_jax.checkpoints import manager
from mert_jax.errors import RESTART
from tests import processes
from tests.runs import command, flags, rows


def start(number, devices, dataset, workdir, *extra):
    line = command("train", *flags(dataset, workdir, *extra))
    return processes.started(line, number, devices)


def mesh(*sizes):
    names = ("data", "fsdp", "tensor")
    return [f"--config.mesh.{name}={size}" for name, size in zip(names, sizes, strict=True)]


def assert_close(found, expected, rtol):
    """Assert that rows of metrics have the same names and nearly the same numbers."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=rtol, err_msg=name)


def without_the_last(workdir, copy):
    """Copy a finished run, as if it had been killed before its last save."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    return copy


def test_two_processes_train_as_one_does(dataset, finished, tmp_path):
    workdir = tmp_path / "two"
    with start(2, 1, dataset, workdir) as running:
        ended = processes.finished(running)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert_close(rows(workdir), rows(finished[0]), rtol=1e-5)
    assert (
        manager.checkpoint_steps(str(workdir))
        == manager.checkpoint_steps(str(finished[0]))
        == [0, 3, 6]
    )
    assert {path.name for path in workdir.iterdir()} == {
        path.name for path in finished[0].iterdir()
    }
    assert "step 6/6" in ended[0][1]
    assert "step 6/6" not in ended[1][1]


@pytest.mark.slow
def test_four_processes_go_on_where_one_was(dataset, finished, tmp_path):
    workdir = without_the_last(finished[0], tmp_path / "four")
    with start(4, 2, dataset, workdir, *mesh(2, 2, 2)) as running:
        ended = processes.finished(running)
    assert [code for code, *_ in ended] == [0] * 4, ended
    assert "at step 3 of 6" in ended[0][1]
    assert_close(rows(workdir), rows(finished[0]), rtol=1e-4)


def test_a_signal_to_one_stops_all_after_the_same_step(dataset, tmp_path):
    extra = ("--config.total_steps=100000", "--config.checkpoint.every_steps=0")
    with start(2, 1, dataset, tmp_path / "run", *extra) as running:
        for line in running[0].stdout:
            if line.startswith("step 2/"):
                break
        running[1].send_signal(signal.SIGTERM)
        ended = processes.finished(running)
    assert [code for code, *_ in ended] == [RESTART, RESTART], ended
    (stopped,) = (line for line in ended[0][1].splitlines() if "stopped and saved" in line)
    last = manager.checkpoint_steps(str(tmp_path / "run"))[-1]
    assert f"at step {last};" in stopped
    assert 2 < last < 20


def test_a_checkpoint_that_one_cannot_read_makes_all_begin_again(
    dataset,
    finished,
    tmp_path,
):
    workdir = without_the_last(finished[0], tmp_path / "damaged")
    files = [p for p in (workdir / "checkpoints" / "3").rglob("*") if p.is_file()]
    os.truncate(max(files, key=lambda p: p.stat().st_size), 100)
    with start(2, 1, dataset, workdir) as running:
        ended = processes.finished(running)
    assert [code for code, *_ in ended] == [RESTART, RESTART], ended
    assert "checkpoint 3 is damaged" in ended[0][2] + ended[1][2]
    assert manager.checkpoint_steps(str(workdir)) == [0]
    assert len(os.listdir(workdir / "damaged")) == 1
