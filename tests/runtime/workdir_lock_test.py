"""A workdir is locked to one run at a time and to its config."""

import copy
import json
import os

import jax.numpy as jnp
import pytest

from mert_jax.checkpoints import manager
from mert_jax.errors import UserError
from mert_jax.runtime import workdir_lock

CONFIG = {
    "seed": 1,
    "total_steps": 100,
    "data": {"dir": "/a", "num_samples": 48_000, "threads": 2},
    "checkpoint": {"every_steps": 10},
    "model": {"unroll": 1},
    "teachers": ("random_projection", "cqt"),
    "teacher": {"cqt": {"weight": 1.0}},
}


def changed(path: str, value) -> dict:
    config = copy.deepcopy(CONFIG)
    *parents, name = path.split(".")
    tree = config
    for parent in parents:
        tree = tree[parent]
    tree[name] = value
    return config


def test_the_config_is_written_once(tmp_path):
    workdir = tmp_path / "new" / "run"
    workdir_lock.lock_workdir(str(workdir), CONFIG)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert sorted(os.listdir(workdir)) == ["config.json", "lock"]
    workdir_lock.lock_workdir(str(workdir), changed("total_steps", 200))
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 100


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("total_steps", 5), ("data.dir", "/b"), ("data.threads", 9), ("model.unroll", 2)),
        ("checkpoint.every_steps", 1),
    ],
)
def test_settings_that_may_change(tmp_path, path, value):
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    workdir_lock.lock_workdir(str(tmp_path), changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", 2, "seed: 1 there, 2 now"),
        ("data.num_samples", 24_000, "data.num_samples: 48000 there, 24000 now"),
        ("data.weights", (4, 1), r"data.weights: None there, \[4, 1\] now"),
        ("teacher.cqt.weight", 0.5, "teacher.cqt.weight: 1.0 there, 0.5 now"),
        ("teachers", ("cqt",), r"teachers: \['random_projection', 'cqt'\] there, \['cqt'\] now"),
        ("group", 8, "group: None there, 8 now"),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path, path, value, message):
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    with pytest.raises(UserError, match=message):
        workdir_lock.lock_workdir(str(tmp_path), changed(path, value))


def test_a_removed_setting_at_its_default_is_no_change(tmp_path):
    workdir_lock.lock_workdir(str(tmp_path), changed("model.attention_relax", 0.0))
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)


def test_a_removed_setting_that_was_used_is_refused(tmp_path):
    workdir_lock.lock_workdir(str(tmp_path), changed("model.fitted_gelu", True))
    with pytest.raises(UserError, match=r"model\.fitted_gelu: True there, None now"):
        workdir_lock.lock_workdir(str(tmp_path), CONFIG)


def test_release_works_only_before_the_run_begins(tmp_path):
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    workdir_lock.release_workdir(str(tmp_path))
    assert os.listdir(tmp_path) == []
    workdir_lock.lock_workdir(str(tmp_path), changed("seed", 2))
    (tmp_path / "metrics.jsonl").write_text("")
    workdir_lock.release_workdir(str(tmp_path))
    assert (tmp_path / "config.json").exists()


def test_a_checkpoint_without_a_run_is_not_resumed(tmp_path):
    manager.Checkpoints(str(tmp_path), keep=1).close()
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    os.unlink(tmp_path / "config.json")
    checkpoints = manager.Checkpoints(str(tmp_path), keep=1)
    checkpoints.save(3, {"x": jnp.zeros(2)})
    checkpoints.close()
    assert manager.checkpoint_steps(str(tmp_path)) == [3]
    with pytest.raises(UserError, match=r"--config\.init_from="):
        workdir_lock.lock_workdir(str(tmp_path), CONFIG, resumes=True)


def test_every_change_is_named(tmp_path):
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    with pytest.raises(UserError, match=r"(?s)data.num_samples.*seed"):
        workdir_lock.lock_workdir(str(tmp_path), changed("data.num_samples", 1) | {"seed": 3})


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        workdir_lock.lock_workdir(str(tmp_path / "file" / "run"), CONFIG)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"], ids=["cut off", "not text"])
def test_a_config_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot be used"):
        workdir_lock.lock_workdir(str(tmp_path), CONFIG)


def test_two_hosts_lock_one_directory_at_once(tmp_path, monkeypatch):
    replace, host = os.replace, [0]

    def while_another_locks(source, target):
        if host[0] == 0:
            host[0] = 1
            workdir_lock.lock_workdir(str(tmp_path), CONFIG)
        replace(source, target)

    monkeypatch.setattr(workdir_lock.jax, "process_index", lambda: host[0])
    monkeypatch.setattr(workdir_lock.os, "replace", while_another_locks)
    workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "lock"]


def test_a_second_run_is_refused_until_the_lock_is_closed(tmp_path):
    lock = workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    with pytest.raises(UserError, match=f"in use by another run \\(process {os.getpid()}\\)"):
        workdir_lock.lock_workdir(str(tmp_path), CONFIG)
    lock.close()
    workdir_lock.lock_workdir(str(tmp_path), CONFIG).close()
