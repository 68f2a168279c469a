"""The launch scripts, with stand-ins for the machines they start things on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
QUICK = os.environ | {"MERT_JAX_PAUSE": "0"}


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=QUICK | environment,
    )


def command(folder, *codes):
    """A command that ends with each of `codes` in turn, and says on a line how often it ran."""
    counted = f"echo x >> {folder}/ran; n=$(wc -l < {folder}/ran); set -- {' '.join(codes)}"
    return ["bash", "-c", f"{counted}; shift $((n - 1)); exit $1"]


def times(folder):
    return len((folder / "ran").read_text().splitlines())


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_every_script_is_well_formed(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize(
    ("codes", "ran"), [("0", 1), ("75 137 134 0", 4), ("75 2", 2), ("130", 1), ("1", 1)]
)
def test_what_asks_for_it_runs_again(tmp_path, codes, ran):
    done = run("again.sh", *command(tmp_path, *codes.split()))
    assert done.returncode == int(codes.split()[-1])
    assert times(tmp_path) == ran
    assert done.stderr.count("again in 0 s") == ran - 1


def test_a_signal_is_handed_down_and_nothing_runs_again(tmp_path):
    saves = f"trap 'sleep 0.5; echo saved > {tmp_path}/saved; exit 75' TERM"
    waits = ["bash", "-c", f"{saves}; echo x >> {tmp_path}/ran; while true; do sleep 0.1; done"]
    script = ["bash", str(LAUNCH / "again.sh"), *waits]
    with subprocess.Popen(script, env=QUICK, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ran").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
    assert (tmp_path / "saved").exists()
    assert times(tmp_path) == 1


def stand_in(folder, name, does="true"):
    """A program `name` that notes its arguments, and then `does` something."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/said\n{does}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "queues_again"), [(75, True), (137, True), (2, False), (0, False)]
)
def test_slurm_queues_again_what_asks_for_it(tmp_path, code, queues_again):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol")
    path = f"{tmp_path}:{os.environ['PATH']}"
    options = dict(PATH=path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    done = run("slurm.sh", "--config=configs/large.py", "--workdir=a b", **options)
    assert done.returncode == code
    said = (tmp_path / "said").read_text()
    assert "python -m mert_jax.train --config=configs/large.py --workdir=a b" in said
    assert ("scontrol requeue 7" in said) == queues_again
    assert run("slurm.sh", **options).returncode == 2


def test_a_tpu_gets_the_checkout_and_the_command(tmp_path):
    stand_in(tmp_path, "gcloud")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "set TPU" in run("tpu_vm.sh", "--config=x", PATH=path, TPU="", ZONE="z").stderr
    options = dict(PATH=path, TPU="mine", ZONE="here")
    done = run("tpu_vm.sh", "--config=configs/large.py", "--workdir=/mnt/a b", **options)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text()
    assert "tpu-vm scp" in said
    assert (
        "again.sh python -m mert_jax.train --config=configs/large.py --workdir=/mnt/a\\ b" in said
    )
    assert said.count("--worker=all") == said.count("mine")
    assert run("tpu_vm.sh", "--stop", **options).returncode == 0
    assert "pkill -TERM" in (tmp_path / "said").read_text()
