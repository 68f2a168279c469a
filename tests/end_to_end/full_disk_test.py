"""Faults of the machine: a full disk, and reads that never return."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from mert_jax.checkpoints import manager
from mert_jax.errors import RESTART
from tests.runs import ENVIRONMENT, command, flags, rows, run


@pytest.mark.slow
def test_a_disk_that_takes_no_more(dataset, finished, tmp_path):
    """A limit on file sizes makes the system refuse the next checkpoint, as on a full disk.

    Without the limit, the same command ends like an undisturbed run.
    """
    workdir = tmp_path / "full"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    limited = f"ulimit -f 20; exec {shlex.join(command('train', *flags(dataset, workdir)))}"
    done = subprocess.run(
        ["bash", "-c", limited],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": ""},
    )
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()  # no tracebacks from Orbax's threads
    assert "a checkpoint could not be written" in said
    assert "step of the last intact one: 3; make room and run the same command again" in said
    assert manager.checkpoint_steps(str(workdir)) == [0, 3]
    done = run("train", *flags(dataset, workdir))
    assert done.returncode == 0, done.stderr
    assert rows(workdir) == rows(finished[0])


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.slow
def test_a_read_that_never_comes_back(dataset, tmp_path):
    """The watchdog ends a run a minute after its readers stop; the same command resumes."""
    steps = ("--config.total_steps=100000", "--config.checkpoint.every_steps=2")
    stalls = ("--config.data.workers=1", "--config.watchdog_minutes=1")
    line = command("train", *flags(dataset, tmp_path / "run", *steps, *stalls))
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        for text in process.stdout:
            if text.startswith("step 5/"):
                break
        readers = children(process.pid)
        for reader in readers:
            os.kill(reader, signal.SIGSTOP)
        try:
            process.wait(timeout=180)
        finally:
            for reader in readers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(reader, signal.SIGKILL)  # they hold the pipes
        _, errors = process.communicate(timeout=60)
    assert readers
    assert process.returncode == RESTART
    assert "no progress for 60 s" in errors
    assert "train.py" in errors
    assert "train.py" in (tmp_path / "run" / "stalled.0.txt").read_text()
    last = manager.checkpoint_steps(str(tmp_path / "run"))[-1]
    again = run(
        "train", *flags(dataset, tmp_path / "run", *steps[1:], f"--config.total_steps={last + 2}")
    )
    assert again.returncode == 0, again.stderr
    assert f"at step {last} of {last + 2}" in again.stdout
