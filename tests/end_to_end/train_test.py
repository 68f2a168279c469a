"""The train command on a prepared dataset, run as a user runs it."""

import json
import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from mert_jax.checkpoints import workdir as workdirs
from tests.runs import ENVIRONMENT, command, flags, read_jsonl, rows, run, slow

CONTRACT = {
    *("step", "loss", "loss_codes", "loss_cqt", "features_penalty", "masked_accuracy"),
    *("code_perplexity", "grad_norm", "learning_rate", "audio_seconds_per_second", "mfu"),
}


def test_metrics_are_those_of_the_contract(finished):
    workdir, printed = finished
    found = read_jsonl(workdir / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row in found:
        assert set(row) >= CONTRACT
        assert len(row["masked_accuracy"]) == len(row["code_perplexity"]) == 2
        assert ("validation_loss" in row) == (row["step"] in (3, 6))
    assert found[0]["learning_rate"] == 0
    assert "step 6/6" in printed
    assert "validation loss" in printed


@pytest.mark.slow
def test_two_datasets_are_mixed_and_validated_each(music, dataset, finished, tmp_path):
    other, workdir = tmp_path / "other", tmp_path / "mix"
    two = f"--input={music / '1.wav'},{music / '2.wav'}"
    assert run("prepare", two, f"--output={other}", "--crop_seconds=2").returncode == 0
    mix = (f"--config.data.dir={dataset},{other}", "--config.data.weights=(3, 1)")
    done = run("train", *flags(dataset, workdir, *mix))
    assert done.returncode == 0, done.stderr
    assert f"in {dataset}: 2 codebooks" in done.stdout
    assert f"in {other}: 2 codebooks" in done.stdout
    last, alone = rows(workdir)[-1], rows(finished[0])[-1]
    low, high = sorted(last["validation_losses"])
    assert low < last["validation_loss"] < high
    assert last["loss"] != alone["loss"]
    assert "validation_losses" not in alone
    done = run("train", *flags(dataset, workdir))
    assert "data.weights: [3, 1] there, [] now" in done.stderr


def test_a_second_run_says_that_it_is_finished(dataset, finished):
    workdir, _ = finished
    before = rows(workdir)
    done = run("train", *flags(dataset, workdir))
    assert done.returncode == 0
    assert "finished: 6 of 6 steps" in done.stdout
    assert rows(workdir) == before


def test_resuming_gives_the_run_that_was_never_stopped(dataset, finished, tmp_path):
    workdir, _ = finished
    resumed = tmp_path / "resumed"
    shutil.copytree(workdir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")  # as if killed before the last save
    done = run("train", *flags(dataset, resumed))
    assert done.returncode == 0, done.stderr
    assert "at step 3 of 6" in done.stdout
    assert rows(resumed) == rows(workdir)
    undisturbed, stopped = (workdirs.read_checkpoint(str(path)) for path in (workdir, resumed))
    states = ((each.params, each.moments) for each in (undisturbed, stopped))
    jax.tree.map(np.testing.assert_array_equal, *states)


MESHES = {  # devices, and the mesh over data, fsdp and tensor; the finished run had 2 and (2, 1, 1)
    "1 device": (1, (1, 1, 1)),
    "4 devices in another mesh": (4, (1, 2, 2)),
    "8 devices": (8, (8, 1, 1)),
    "8 devices in another mesh": (8, (2, 2, 2)),
}
QUICK = "4 devices in another mesh"


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, marks=() if m == QUICK else pytest.mark.slow) for m in MESHES],
)
def test_a_run_goes_on_with_other_devices(dataset, finished, tmp_path, mesh):
    workdir, resumed = finished[0], tmp_path / "resumed"
    shutil.copytree(workdir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    devices, sizes = MESHES[mesh]
    names = ("data", "fsdp", "tensor")
    extra = [f"--config.mesh.{name}={size}" for name, size in zip(names, sizes, strict=True)]
    done = subprocess.run(
        command("train", *flags(dataset, resumed, *extra)),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
    )
    assert done.returncode == 0, done.stderr
    for row, other in zip(rows(workdir), rows(resumed), strict=True):
        # clips, masks and counts of codes are the same; sums are added in another order
        assert other["code_perplexity"] == row["code_perplexity"]
        for name in ("loss", "loss_codes", "loss_cqt", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4)


def test_other_settings_on_a_workdir_are_refused(dataset, finished):
    workdir, _ = finished
    done = run("train", *flags(dataset, workdir, "--config.model.num_layers=3"))
    assert done.returncode == 2
    assert "model.num_layers: 2 there, 3 now" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_control_c_saves_and_the_same_command_goes_on(dataset, tmp_path):
    workdir = tmp_path / "stopped"
    long = flags(dataset, workdir, "--config.total_steps=100000", "--config.eval_every=100000")
    process = subprocess.Popen(
        command("train", *long), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130  # SIGTERM gives 75: kill_and_resume_test
    assert "run the same command to go on" in printed
    stopped = rows(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    done = run("train", *flags(dataset, workdir, f"--config.total_steps={stopped + 1}"))
    assert done.returncode == 0, done.stderr
    assert rows(workdir)[-1]["step"] == stopped + 1


def test_an_exploding_learning_rate_is_skipped_gone_back_from_and_stopped(dataset, tmp_path):
    workdir = tmp_path / "exploded"
    explode = (
        *("--config.optimizer.peak_learning_rate=1e30", "--config.checkpoint.every_steps=1"),
        *("--config.guard.streak=2", "--config.guard.rollbacks=1"),
    )
    done = run("train", *flags(dataset, workdir, *explode))
    assert done.returncode == 2
    bad = read_jsonl(workdir / "bad_steps.jsonl")
    first, step = bad[0]["batch"], bad[0]["step"]
    assert f"going back to step {step - 1}, and on with batch {first + 2}" in done.stdout
    assert f"the first at step {step}, after 1 rollbacks" in done.stderr
    assert "peak_learning_rate" in done.stderr
    assert [(row["step"], row["batch"], row["in_a_row"]) for row in bad] == [
        *((step, first, 1), (step + 1, first + 1, 2)),
        *((step, first + 2, 1), (step + 1, first + 3, 2)),
    ]
    assert bad[0]["loss"] is None  # not a number, in JSON
    assert all(len(row["records"]) == 8 for row in bad)


def test_a_run_begins_from_another_runs_weights(dataset, finished, tmp_path):
    workdir = tmp_path / "continued"
    more = (f"--config.init_from={finished[0]}", "--config.total_steps=1")
    done = run("train", *flags(dataset, workdir, *more))
    assert done.returncode == 0, done.stderr
    assert "body: 26,544 parameters loaded" in done.stdout
    assert "head random_projection: loaded" in done.stdout
    assert "Adam's moments: loaded, of 6 updates" in done.stdout
    # the learning rate of the first update is 0, so the loss is that of the other run's last step
    before, after = (rows(path)[-1]["validation_loss"] for path in (finished[0], workdir))
    assert after == pytest.approx(before, rel=1e-6)
    with open(workdir / "model.json") as f:
        assert json.load(f)["lineage"] == [f"{finished[0].name} (step 6)"]
    again = run("train", *flags(dataset, workdir, *more))  # nothing is loaded a second time
    assert "is finished" in again.stdout


def resident(pid: int) -> int:
    """Return the resident memory of a process, kB."""
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))


@pytest.mark.slow
def test_memory_does_not_grow(dataset, tmp_path):
    steps = ("--config.total_steps=2000", "--config.log_every=100", "--config.eval_every=500")
    process = subprocess.Popen(
        command("train", *flags(dataset, tmp_path, *steps, "--config.checkpoint.every_steps=100")),
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    used = {}
    for line in process.stdout:
        if line.startswith(("step 200/", "step 1900/")):
            used[line.split("/")[0]] = resident(process.pid)
    assert process.wait() == 0
    print(used)
    assert used["step 1900"] <= 1.05 * used["step 200"], used


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--config.nope=1"], "unknown config key 'nope'"),
        (["--config.data.dir=/nowhere"], "no prepared dataset in /nowhere"),
        (["--workdir=/proc/nowhere"], "cannot be used"),
        *slow(
            (["--config.seed=abc"], "invalid literal for int"),
            (["--config.data.num_samples=96000"], "--crop_seconds=4"),
            (["--config.data.weights=(0.8, 0.2)"], "are 2 (0.8, 0.2) for 1 datasets"),
            (["--config.teachers=('nope',)"], "unknown teacher 'nope'"),
            (["--config.mesh.data=3"], "does not make 2 devices"),
            (["--config=configs/nope.py"], "configs/nope.py"),
            (["--config.init_from=/nowhere"], "/nowhere does not exist"),
        ),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(dataset, tmp_path, extra, message):
    workdir = tmp_path / "none"
    done = run("train", *flags(dataset, workdir, *extra))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not os.path.exists(workdir)


@pytest.mark.parametrize(
    ("config", "parameters"), [("base", "95,550,160"), ("large", "317,875,664")]
)
def test_describe_counts_the_official_parameters(config, parameters):
    done = run("train", f"--config=configs/{config}.py", "--describe")
    assert done.returncode == 0
    assert f"parameters: {parameters}" in done.stdout
