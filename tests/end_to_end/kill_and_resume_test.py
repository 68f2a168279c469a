"""A run that is killed repeatedly ends bit for bit like an undisturbed run."""

import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from mert_jax.checkpoints import manager
from mert_jax.checkpoints import workdir as workdirs
from mert_jax.errors import RESTART
from tests.codec_samples import write_codec
from tests.runs import ENVIRONMENT, command, flags, read_jsonl, rows, run

# a guard this strict skips updates and rolls back on good data too
OPTIONS = (
    # checkpoints that stops add must not displace those that the guard rolls back to
    *("--config.eval_every=20", "--config.checkpoint.every_steps=4", "--config.checkpoint.keep=9"),
    *("--config.guard.factor=1.0", "--config.guard.window=8", "--config.guard.streak=3"),
    *("--config.guard.rollbacks=1000", "--config.optimizer.peak_learning_rate=1e-4"),
)


@pytest.fixture(scope="module")
def mixed(music, dataset, tmp_path_factory):
    """Flags for everything that affects a batch: two datasets with unequal shares and a few steps
    per epoch, stored codes, and two micro-batches."""
    codec = write_codec(str(tmp_path_factory.mktemp("codec")))
    folders = [tmp_path_factory.mktemp("coded") / name for name in ("all", "two")]
    two = f"{music / '0.wav'},{music / '2.wav'}"
    for folder, source in zip(folders, (music, two), strict=True):
        options = (f"--output={folder}", "--crop_seconds=2", f"--codes={codec}")
        done = run("prepare", f"--input={source}", *options)
        assert done.returncode == 0, done.stderr
    return (
        f"--config.data.dir={','.join(map(str, folders))}",
        *("--config.data.weights=(3, 1)", "--config.accumulation=2"),
        "--config.teachers=('rvq_vae', 'cqt')",
    )


def outcome(workdir):
    """Return the metrics of a run that do not depend on the clock, its bad steps and last state."""
    bad = read_jsonl(workdir / "bad_steps.jsonl")
    checkpoint = workdirs.read_checkpoint(str(workdir))
    return rows(workdir), bad, checkpoint.step, (checkpoint.params, checkpoint.moments)


def run_until(line, process):
    """Read output of `process` up to a line for which `line` is true; return the lines."""
    printed = []
    for text in process.stdout:
        printed.append(text)
        if line(text):
            break
    return printed


@pytest.mark.slow
def test_a_run_killed_at_random_moments(dataset, mixed, tmp_path):
    kills, total = 25, 60
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    options = (*OPTIONS, *mixed, f"--config.total_steps={total}")
    started = command("train", *flags(dataset, hunted, *options))
    undisturbed = command("train", *flags(dataset, calm, *options))
    done = subprocess.run(undisturbed, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "going back to step" in done.stdout
    rng, steps = random.Random(0), 0
    for _ in range(kills):
        process = subprocess.Popen(
            started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        steps = rng.randrange(1, 3 + total // kills)  # between, during and just after saves
        seen = iter(range(steps))
        run_until(
            lambda text, seen=seen: text.startswith("step ") and next(seen, None) is None, process
        )
        time.sleep(rng.random() * 0.3)
        how = rng.choice([signal.SIGKILL, signal.SIGTERM])
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -how, RESTART), errors
    done = subprocess.run(started, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    metrics, bad, step, state = outcome(calm)
    metrics2, bad2, step2, state2 = outcome(hunted)
    assert step == step2 == total
    assert metrics2 == metrics
    assert bad2 == bad
    jax.tree.map(np.testing.assert_array_equal, state2, state)
    assert total in manager.checkpoint_steps(str(hunted))
