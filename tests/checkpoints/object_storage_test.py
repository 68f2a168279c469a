"""Workdirs and datasets in object storage, on a real server behind an unreliable connection."""

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from mert_jax.checkpoints import formats, manager, object_storage
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.checkpoints.object_storage import WorkdirMirror
from mert_jax.errors import RetryableError, UserError
from tests.object_store import BUCKET, serving, upload
from tests.runs import ENVIRONMENT, command, flags, rows


@pytest.fixture(scope="module")
def server():
    with serving() as line:
        yield line


@pytest.fixture
def line(server):
    yield server
    server.delay, server.cut_every, server.dead = 0.0, 0, False


def append(mirror, text, name="metrics.jsonl"):
    path = os.path.join(mirror.folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a") as file:
        file.write(text)


def stored(name):
    return object_storage.bucket().cat_file(f"{BUCKET}/{name}").decode()


def test_a_local_workdir_is_its_own_folder(tmp_path):
    with WorkdirMirror(str(tmp_path), writes=True) as mirror:
        assert mirror.folder == str(tmp_path)
        mirror.claim()
        mirror.flush()
    assert not os.listdir(tmp_path)


def test_changed_files_are_uploaded_and_fetched(line):
    with WorkdirMirror(f"{BUCKET}/a/run", writes=True) as mirror:
        mirror.claim()
        append(mirror, "one\n")
        append(mirror, "events", "tensorboard/events")
        append(mirror, "half", ".metrics.jsonl.tmp")
        mirror.flush()
        assert stored("a/run/metrics.jsonl") == "one\n"
        append(mirror, "two\n")
        os.unlink(os.path.join(mirror.folder, "tensorboard/events"))
    assert stored("a/run/metrics.jsonl") == "one\ntwo\n"
    assert sorted(object_storage.bucket().find(f"{BUCKET}/a/run")) == [
        "bucket/a/run/metrics.jsonl",
        "bucket/a/run/owner",
    ]
    with WorkdirMirror(f"{BUCKET}/a/run/", writes=False) as mirror:
        assert Path(mirror.folder, "metrics.jsonl").read_text() == "one\ntwo\n"
        append(mirror, "of another host\n")
        mirror.flush()
    assert stored("a/run/metrics.jsonl") == "one\ntwo\n"


def test_the_last_run_to_start_owns_the_workdir(line):
    first = WorkdirMirror(f"{BUCKET}/b/run", writes=True).__enter__()
    first.claim()
    append(first, "mine\n")
    first.flush()
    with WorkdirMirror(f"{BUCKET}/b/run", writes=True) as second:
        second.claim()
        append(second, "and mine\n")
    append(first, "late\n")
    with pytest.raises(UserError, match="another run has taken gs://bucket/b/run over") as caught:
        first.flush()
    assert not isinstance(caught.value, RetryableError)
    first.__exit__(None)
    assert stored("b/run/metrics.jsonl") == "mine\nand mine\n"


def test_a_cut_connection_is_retried(line):
    line.cut_every = 4
    with WorkdirMirror(f"{BUCKET}/c/run", writes=True) as mirror:
        mirror.claim()
        for i in range(4):
            append(mirror, f"{i}\n")
            mirror.flush()
        line.cut_every = 0
    assert line.cuts
    assert stored("c/run/metrics.jsonl") == "0\n1\n2\n3\n"


def test_push_does_not_wait_for_a_slow_server(line):
    with WorkdirMirror(f"{BUCKET}/d/run", writes=True) as mirror:
        mirror.claim()
        line.delay = 0.5
        begin = time.monotonic()
        for i in range(20):
            append(mirror, f"{i}\n")
            mirror.push()
        assert time.monotonic() - begin < 0.5
        mirror.flush()
        assert time.monotonic() - begin > 0.5
        assert stored("d/run/metrics.jsonl").splitlines() == [str(i) for i in range(20)]


def test_an_unreachable_server_is_a_retryable_error(line, monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with WorkdirMirror(f"{BUCKET}/e/run", writes=True) as mirror:
        mirror.claim()
        line.dead = True
        append(mirror, "lost\n")
        with pytest.raises(
            RetryableError, match=r"cannot be reached: .*run the same command again"
        ):
            mirror.flush()


@pytest.mark.parametrize("path", ["gs://no-such-bucket/run", f"{BUCKET}/nothing/here"])
def test_a_path_that_does_not_exist(line, path):
    with pytest.raises(UserError, match=rf"{path} (cannot be reached|does not exist)"):
        read_checkpoint(path)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[gcs\]"):
        WorkdirMirror(f"{BUCKET}/run", writes=True).__enter__()


def stored_rows(workdir, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(stored(f"{workdir}/metrics.jsonl"))
    return rows(tmp_path)


def test_a_remote_run_is_killed_resumed_and_read(line, dataset, finished, tmp_path):
    """Dataset, metrics and checkpoints in a bucket: the same rows as on the local disk."""
    upload(dataset, f"{BUCKET}/data")
    workdir = f"{BUCKET}/runs/first"
    options = dict(text=True, env=os.environ | ENVIRONMENT)  # with the server's address
    train = command("train", *flags(f"{BUCKET}/data", workdir))
    with subprocess.Popen(train, stdout=subprocess.PIPE, **options) as process:
        for text in process.stdout:
            if text.startswith("step 4/"):
                process.kill()
    line.delay = 0.01
    done = subprocess.run(train, capture_output=True, **options)
    line.delay = 0.0
    assert done.returncode == 0, done.stderr
    assert f"resuming {workdir} at step" in done.stdout
    assert stored_rows("runs/first", tmp_path) == rows(finished[0])
    assert manager.checkpoint_steps(workdir) == manager.checkpoint_steps(str(finished[0]))

    report = command("report", f"--workdir={workdir}")
    done = subprocess.run(report, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    assert f"wrote {workdir}/report.png" in done.stdout
    assert object_storage.bucket().exists(f"{workdir}/report.html")

    local, remote = (read_checkpoint(str(path)) for path in (finished[0], workdir))
    assert local.step == remote.step
    assert read_checkpoint(f"{workdir}/checkpoints/3").step == 3
    a, b = (x.params["encoder"]["layer_norm"]["scale"] for x in (local, remote))
    assert (a == b).all()
    formats.convert(workdir, str(tmp_path / "hf"), "hf")
    assert read_checkpoint(str(tmp_path / "hf")).params.keys() <= remote.params.keys()
    with pytest.raises(UserError, match="on a local disk"):
        formats.convert(workdir, f"{BUCKET}/hf", "hf")


@pytest.mark.slow
def test_a_run_over_a_connection_that_is_often_cut(line, dataset, finished, tmp_path):
    """Errors that the libraries do not retry end the run, which resumes when it is restarted."""
    train = command("train", *flags(dataset, f"{BUCKET}/runs/cut"))
    line.cut_every = 40
    done = subprocess.run(
        ["bash", "launch/again.sh", *train],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | {"MERT_JAX_PAUSE": "0"},
    )
    line.cut_every = 0
    assert done.returncode == 0, done.stderr
    assert line.cuts > 5
    assert stored_rows("runs/cut", tmp_path) == rows(finished[0])
