"""What a run keeps and restores, and damaged checkpoints."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import sharding
from mert_jax.checkpoints import manager
from mert_jax.errors import UserError


def saved(workdir, *numbers, **options) -> manager.Checkpoints:
    """Save a state that contains its step at each of `numbers`."""
    checkpoints = manager.Checkpoints(str(workdir), **dict(keep=9) | options)
    for number in numbers:
        checkpoints.save(number, state_of(number))
        checkpoints.wait()
    return checkpoints


def state_of(number: int) -> dict:
    values = np.random.default_rng(number).normal(size=(64, 128)).astype(np.float32)
    return {"step": jnp.int32(number), "params": {"kernel": jnp.asarray(values)}}


def restored(checkpoints: manager.Checkpoints, **options) -> int:
    """Return the step restored, having checked its values."""
    state = state_of(0)
    state = checkpoints.restore(state, jax.tree.map(lambda x: x.sharding, state), **options)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(int(state["step"])))
    return int(state["step"])


def files(workdir, step: int) -> list[str]:
    """Return the files of a checkpoint, largest first."""
    paths = (workdir / "checkpoints" / str(step)).rglob("*")
    return sorted((p for p in paths if p.is_file()), key=lambda p: -p.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "one flipped bit": lambda workdir: flip_a_bit(files(workdir, 3)[0]),
    "cut in half": lambda workdir: os.truncate(
        files(workdir, 3)[0], files(workdir, 3)[0].stat().st_size // 2
    ),
    "empty": lambda workdir: os.truncate(files(workdir, 3)[0], 0),
    "a file gone": lambda workdir: files(workdir, 3)[0].unlink(),
    "checksums of another": lambda workdir: shutil.copytree(
        workdir / "checkpoints" / "2" / "checksums",
        workdir / "checkpoints" / "3" / "checksums",
        dirs_exist_ok=True,
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_set_aside_and_the_previous_one_used(
    tmp_path, how, capsys
):
    saved(tmp_path, 1, 2, 3).close()
    DAMAGE[how](tmp_path)
    checkpoints = manager.Checkpoints(str(tmp_path), 9)
    assert restored(checkpoints) == 2
    assert "checkpoint 3 is damaged" in capsys.readouterr().out
    assert manager.checkpoint_steps(str(tmp_path)) == [1, 2]
    (aside,) = os.listdir(tmp_path / "damaged")
    assert aside.startswith("3-")
    checkpoints.save(3, state_of(3))  # its place is free again
    checkpoints.close()
    assert manager.checkpoint_steps(str(tmp_path)) == [1, 2, 3]


def test_without_an_intact_checkpoint_restore_fails_and_changes_nothing(tmp_path):
    saved(tmp_path, 1, 3).close()
    for step in (1, 3):
        os.truncate(files(tmp_path, step)[0], 0)
    checkpoints = manager.Checkpoints(str(tmp_path), 9)
    with pytest.raises(UserError, match=r"no intact checkpoint \(3: .*; 1: .*\); nothing"):
        restored(checkpoints)
    checkpoints.close()
    assert manager.checkpoint_steps(str(tmp_path)) == [1, 3]
    assert not (tmp_path / "damaged").exists()


def test_the_partial_save_of_a_killed_run_is_removed(tmp_path):
    saved(tmp_path, 1, 2).close()
    partial = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "2", partial)
    (partial / "commit_success.txt").unlink(missing_ok=True)
    checkpoints = manager.Checkpoints(str(tmp_path), 9)
    assert restored(checkpoints) == 2
    checkpoints.save(3, state_of(3))  # waits for the removal, which runs in the background
    checkpoints.close()
    assert not partial.exists()


def test_the_newest_stay_and_those_of_every_mth_step(tmp_path):
    saved(tmp_path, *range(1, 11), keep=2, keep_every=4).close()
    assert manager.checkpoint_steps(str(tmp_path)) == [4, 8, 9, 10]


def test_checkpoints_of_stopped_runs_do_not_evict_regular_ones(tmp_path):
    saved(tmp_path, 0, 4, 8, 9, 10, 11, keep=2, every_steps=4).close()
    assert manager.checkpoint_steps(str(tmp_path)) == [4, 8, 10, 11]


def test_a_rollback_restores_an_earlier_regular_step_and_deletes_later_ones(tmp_path):
    checkpoints = saved(tmp_path, 2, 4, 6, every_steps=4)
    assert restored(checkpoints, before=5) == 4
    assert restored(checkpoints, before=4) == 2  # none that 4 divides: any
    assert restored(checkpoints, before=7) == 4  # and not 6, which a stop has saved
    assert restored(checkpoints) == 6
    checkpoints.forget(above=4)
    assert manager.checkpoint_steps(str(tmp_path)) == [2, 4]
    with pytest.raises(UserError, match="no intact checkpoint before step 2"):
        restored(checkpoints, before=2)
    checkpoints.close()


def test_a_checksum_shows_any_change_and_does_not_depend_on_the_sharding():
    x = jnp.arange(64.0, dtype=jnp.float32).reshape(8, 8)
    mesh = sharding.make_mesh(8, 1, 1)
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    assert manager.checksums({"x": x}) == manager.checksums({"x": spread})
    for other in (x.at[3, 3].set(-27.0), x.T, x[::-1], x.at[0, 0].set(-0.0)):
        assert manager.checksums({"x": other}) != manager.checksums({"x": x})
    for dtype in (jnp.bool_, jnp.int32, jnp.bfloat16, jnp.uint8):
        some = jnp.arange(6).astype(dtype)
        assert manager.checksums([some]) != manager.checksums([some[::-1]])


def test_a_failed_save_is_reported_with_the_last_good_step(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(
        checkpoints._manager, "check_for_errors", lambda: (_ for _ in ()).throw(OSError("no space"))
    )
    with pytest.raises(UserError, match="no space; step of the last intact one: 1; make room"):
        checkpoints.check()
    checkpoints._manager.close()
