"""Clips are cut out of one pass over each file."""

import numpy as np
import pytest
import soundfile

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import decoding
from mert_jax.data.decoding import SkippedFile
from mert_jax.probing import waves
from mert_jax.tasks.task import Clip


@pytest.fixture
def noise(tmp_path):
    """A file of 60 s and its wave."""
    wave = 0.1 * np.random.default_rng(0).standard_normal(60 * SAMPLE_RATE).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", wave, SAMPLE_RATE, subtype="FLOAT")
    return str(tmp_path / "noise.wav"), wave


def test_clips_are_parts_of_the_whole(noise):
    path, wave = noise
    spans = [(0.0, 5.0), (5.0, 5.0), (3.0, 30.0), (50.0, 30.0), (20.0, None)]
    found = dict(waves.read([Clip(path, *span) for span in spans], SAMPLE_RATE))
    for index, (start, seconds) in enumerate(spans):
        stop = None if seconds is None else round((start + seconds) * SAMPLE_RATE)
        np.testing.assert_array_equal(found[index], wave[round(start * SAMPLE_RATE) : stop])


def test_a_file_is_opened_once_and_read_no_further_than_needed(noise, monkeypatch):
    path, _ = noise
    files, blocks = [], []
    original = decoding._sndfile_blocks

    def counted(file):
        files.append(file)
        for block in original(file):
            blocks.append(len(block))
            yield block

    monkeypatch.setattr(decoding, "_sndfile_blocks", counted)
    list(waves.read([Clip(path, 2.0 * i, 2.0) for i in range(5)], SAMPLE_RATE))
    assert len(files) == 1
    assert sum(blocks) < 60 * SAMPLE_RATE


def test_what_cannot_be_read_is_said_for_each_clip(noise, tmp_path):
    path, _ = noise
    (tmp_path / "text.wav").write_text("no audio")
    clips = [Clip(str(tmp_path / "gone.wav"))] * 2 + [Clip(str(tmp_path / "text.wav"))]
    clips += [Clip(path, 59.99, 5.0), Clip(path, 70.0, 5.0), Clip(path, 1.0, 1.0)]
    found = dict(waves.read(clips, SAMPLE_RATE))
    reasons = [
        wave.reason if isinstance(wave, SkippedFile) else len(wave) for wave in found.values()
    ]
    assert sorted(found) == list(range(6))
    by_index = [reasons[list(found).index(i)] for i in range(6)]
    assert by_index == ["unreadable"] * 2 + ["not audio"] + ["too short"] * 2 + [SAMPLE_RATE]


def test_a_file_cut_short_leaves_the_clips_before_the_cut(noise, tmp_path):
    path, _ = noise
    with open(path, "rb") as file:
        content = file.read()
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    clips = [Clip(str(tmp_path / "cut.wav"), start, 10.0) for start in (0.0, 10.0, 25.0)]
    found = [wave for _, wave in waves.read(clips, SAMPLE_RATE)]
    assert [isinstance(wave, SkippedFile) for wave in found] == [False, False, True]
    assert found[-1].reason == "truncated"
