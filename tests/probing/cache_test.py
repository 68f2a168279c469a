"""Features are computed once, gone on with, and never those of something else."""

import os

import numpy as np
import pytest
import soundfile

from mert_jax.constants import SAMPLE_RATE
from mert_jax.probing import cache
from mert_jax.probing.features import Features
from mert_jax.tasks.task import Clip

COUNT = 2 * cache.SHARD + 5


class Counting:
    """Features [2, 1] of the level of a wave, that count what they are given, and stop at will."""

    def __init__(self, fingerprint: str = "a", stop_after: int = 10**9):
        self.seen, self.stop_after = 0, stop_after
        self.features = Features(
            "level", fingerprint, 2, SAMPLE_RATE, 75.0, lambda waves: map(self.look, waves),
            lambda waves: (np.repeat(self.look(x)[:, None], len(x) // 320, 1) for x in waves),
        )  # fmt: skip

    def look(self, wave: np.ndarray) -> np.ndarray:
        if self.seen == self.stop_after:
            raise KeyboardInterrupt
        self.seen += 1
        return np.array([[1.0], [10.0]]) * np.abs(wave).max()


@pytest.fixture
def clips(tmp_path):
    found = []
    for i in range(COUNT):
        path = str(tmp_path / f"{i}.wav")
        soundfile.write(path, np.full(2400, (i + 1) / 1000), SAMPLE_RATE, subtype="FLOAT")
        found.append(Clip(path, label=i))
    return found


def run(store, root, features, clips):
    done = []
    return store(str(root), features, clips, done.append), sum(done)


@pytest.mark.parametrize("store", [cache.pooled, cache.frames])
def test_a_stopped_run_goes_on_and_a_second_one_computes_nothing(tmp_path, clips, store):
    root = tmp_path / "cache"
    stopped = Counting(stop_after=cache.SHARD + 9)
    with pytest.raises(KeyboardInterrupt):
        run(store, root, stopped.features, clips)
    again = Counting()
    found, done = run(store, root, again.features, clips)
    kept = cache.SHARD if store is cache.pooled else cache.SHARD + 9
    assert again.seen == COUNT - kept
    assert done == COUNT
    third = Counting()
    same, done = run(store, root, third.features, clips)
    assert third.seen == 0
    assert done == COUNT
    assert same.clips == found.clips == clips
    for i in range(COUNT):
        x = same.x[i] if store is cache.pooled else same.features(i)[:, 0]
        np.testing.assert_allclose(x[:, 0], np.array([1, 10]) * (i + 1) / 1000, rtol=2e-3)
    assert not [name for _, _, names in os.walk(root) for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("store", [cache.pooled, cache.frames])
def test_another_checkpoint_or_another_file_is_computed_anew(tmp_path, clips, store):
    clips, root = clips[:5], tmp_path / "cache"
    run(store, root, Counting().features, clips)
    other = Counting("b")
    run(store, root, other.features, clips)
    assert other.seen == 5
    soundfile.write(clips[2].path, np.full(4800, 0.5), SAMPLE_RATE)
    changed = Counting()
    run(store, root, changed.features, clips)
    assert changed.seen == 5
    cut = Counting()
    run(store, root, cut.features, [*clips[:4], clips[4]._replace(seconds=0.09)])
    assert cut.seen == 5
    relabelled = Counting()
    found, _ = run(store, root, relabelled.features, [c._replace(label=7) for c in clips])
    assert relabelled.seen == 0
    assert {clip.label for clip in found.clips} == {7}


@pytest.mark.parametrize("store", [cache.pooled, cache.frames])
def test_what_cannot_be_read_is_named_every_time(tmp_path, clips, store):
    clips = clips[:4]
    os.unlink(clips[1].path)
    for _ in range(2):
        found, _ = run(store, tmp_path / "cache", Counting().features, clips)
        assert [clip.label for clip in found.clips] == [0, 2, 3]
        assert [(x["path"], x["reason"]) for x in found.left_out] == [(clips[1].path, "unreadable")]
        first = found.x[1, 0, 0] if store is cache.pooled else found.features(1)[0, 0, 0]
        np.testing.assert_allclose(first, 0.003, rtol=2e-3)


def test_sources_are_kept_beside_the_mixture(tmp_path, clips):
    stems = {"low": clips[1].path, "high": clips[2].path}
    mixed = [clips[0]._replace(label=stems), clips[3]._replace(label=stems)]
    found, _ = run(cache.frames, tmp_path / "cache", Counting().features, mixed)
    np.testing.assert_allclose(found.waves(1)[:, 0], [0.004, 0.002, 0.003], atol=2e-5)
    assert found.waves(0).shape == (3, 2400)


def test_frames_that_do_not_fit_are_refused_with_a_way_out(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(cache.UserError, match="--layers=7"):
        run(cache.frames, tmp_path / "cache", Counting().features, clips[:9])
