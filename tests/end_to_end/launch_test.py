"""The launch scripts, with stand-ins for gcloud, Slurm and SkyPilot."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
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
    """Return a command that exits with each of `codes` in turn and counts its runs in a file."""
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
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()  # leaving the block waits for the process
    assert process.returncode == 75, errors
    assert (tmp_path / "saved").exists()
    assert times(tmp_path) == 1


def test_a_signal_that_comes_before_the_command_is_known_is_not_lost(tmp_path):
    """The command stops the script that started it before doing anything else."""
    waits = f"echo x >> {tmp_path}/ran; trap 'exit 75' TERM; kill -TERM $PPID; sleep 5; exit 1"
    # the script learns the process id late
    slow = (LAUNCH / "again.sh").read_text().replace("child=$!", "sleep 1; child=$!")
    (tmp_path / "again.sh").write_text(slow)
    done = subprocess.run(
        ["bash", tmp_path / "again.sh", "bash", "-c", waits.replace("sleep 5", "sleep 5 & wait")],
        env=QUICK,
        timeout=60,
    )
    assert done.returncode == 75
    assert times(tmp_path) == 1


def stand_in(folder, name, does="true"):
    """Write a program `name` that records its arguments and then runs the commands `does`."""
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


@pytest.fixture
def tpu(tmp_path):
    """Runs tpu_vm.sh on a TPU that is in each of `states` in turn; returns its calls of gcloud.

    The script is ended after the last state.
    """

    def run_on(*arguments, states="ACTIVE", fails="", **environment):
        # minutes take no time; the look after the last state ends the script
        look = (
            f"n=$(cat {tmp_path}/looks 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/looks"
        )
        given = (
            f'set -- {states}; [ $n -lt $# ] || {{ kill $PPID; exit; }}; shift $n; echo "${{1#-}}"'
        )
        failing = f'case "$*" in *"{fails}"*) [ -z "{fails}" ] || exit 1 ;; esac'
        stand_in(tmp_path, "gcloud", f'case "$*" in *describe*) {look}; {given} ;; esac\n{failing}')
        path = f"{tmp_path}:{os.environ['PATH']}"
        defaults = dict(PATH=path, TPU="mine", ZONE="here", TYPE="v5litepod-16")
        done = run("tpu_vm.sh", *arguments, **defaults | environment)
        said = tmp_path / "said"
        return done, said.read_text() if said.exists() else ""

    return run_on


def test_a_tpu_gets_the_checkout_and_the_command(tpu):
    assert "set TPU" in tpu("--config=x", TPU="")[0].stderr
    done, said = tpu("--config=configs/large.py", "--workdir=/mnt/a b")
    assert done.returncode == 0, done.stderr
    assert "tpu-vm scp" in said
    assert (
        "again.sh python -m mert_jax.train --config=configs/large.py --workdir=/mnt/a\\ b" in said
    )
    assert said.count("--worker=all") == said.count("mine")
    done, said = tpu("--stop")
    assert done.returncode == 0
    assert "pkill -TERM" in said


def test_a_tpu_is_asked_for_and_given_back(tpu):
    done, said = tpu("--create", SPOT="1")
    assert done.returncode == 0, done.stderr
    assert "queued-resources create mine --node-id=mine --zone=here" in said
    assert "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot" in said
    assert "queued-resources delete mine --zone=here --force" in tpu("--delete")[1]
    done, _ = tpu("--create", TYPE="v9-8")
    assert done.returncode == 2
    assert "TYPE=v9-8 is none of" in done.stderr


def test_a_preempted_tpu_is_asked_for_again(tpu):
    """The TPU is absent ("-"), requested, present, preempted, and present again."""
    done, said = tpu("--keep", "--config=x", states="- WAITING ACTIVE ACTIVE SUSPENDED - ACTIVE")
    verbs = [line.split()[4] for line in said.splitlines() if "queued-resources" in line]
    assert [verb for verb in verbs if verb != "describe"] == ["create", "delete", "create"]
    assert said.count("again.sh python -m mert_jax.train --config=x") == 2
    assert "mine is SUSPENDED: asking for it again" in done.stderr


def test_a_worker_that_cannot_be_reached_is_tried_again(tpu):
    _, said = tpu("--keep", "--config=x", states="ACTIVE ACTIVE", fails="tpu-vm scp")
    assert said.count("tpu-vm scp") == 2
    assert "again.sh" not in said


def test_a_dry_run_says_what_it_would_do(tpu):
    done, said = tpu("--keep", "--config=x", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert said == ""
    assert [line.split()[:5] for line in done.stdout.splitlines()] == [
        ["gcloud", "compute", "tpus", kind, verb]
        for kind, verb in [
            ("queued-resources", "create"),
            ("tpu-vm", "scp"),
            ("tpu-vm", "ssh"),
            ("tpu-vm", "ssh"),
        ]
    ]


def test_shellcheck_finds_nothing():
    scripts = [str(path) for path in [*LAUNCH.glob("*.sh"), LAUNCH.parent / ".ci" / "run"]]
    done = subprocess.run(["shellcheck", "--severity=warning", *scripts], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_sky_starts_as_many_processes_as_machines(tmp_path):
    job = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert (LAUNCH.parent / job["envs"]["FLAGS"].removeprefix("--config=")).exists()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "again.sh").write_text('echo "$*"')

    def said(number, index):
        nodes = dict(SKYPILOT_NUM_NODES=number, SKYPILOT_NODE_RANK=index)
        done = subprocess.run(
            ["bash", "-euc", job["run"]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | job["envs"] | nodes | dict(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2"),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "mert_jax.train --config=configs/large.py --workdir=" in said("1", "0")
    assert "--coordinator" not in said("1", "0")
    assert "--coordinator=10.0.0.1:8476 --num_processes=2 --process_id=1" in said("2", "1")
