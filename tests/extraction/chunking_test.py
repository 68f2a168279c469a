"""Recordings are cut into segments, and segments of one length are batched."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mert_jax.extraction import chunking

HOP, FIELD = 20, 40


class Length:
    """Stands in for Moments: the norm of a wave is its length."""

    samples = 0

    def add(self, block):
        self.samples += len(block)

    def norm(self):
        return self.samples


def chunker(window=0, chunk=30, context=5):
    return chunking.Chunker(HOP, FIELD, chunk, context, window, Length)


@given(frames=st.integers(1, 3000), length=st.integers(3, 400), data=st.data())
def test_chunks_keep_every_frame_once_with_its_context(frames, length, data):
    context = data.draw(st.integers(0, (length - 1) // 2))
    pieces = chunker(0, length, context).pieces((frames - 1) * HOP + FIELD)
    kept = [start // HOP + t for start, _, first, last in pieces for t in range(first, last)]
    assert kept == list(range(frames))
    for start, stop, first, last in pieces:
        before, number = start // HOP, (stop - start - FIELD) // HOP + 1
        assert number == min(length, frames)
        assert first >= min(context, before + first)
        assert number - last >= min(context, frames - before - last)


@given(frames=st.integers(1, 20_000))
def test_buckets_are_few_and_close(frames):
    assert frames <= chunking.bucket(frames) <= frames * (1 + 1 / chunking.STEPS)
    assert chunking.bucket(chunking.bucket(frames)) == chunking.bucket(frames)


def test_an_octave_has_a_few_buckets():
    assert len({chunking.bucket(frames) for frames in range(1025, 2049)}) == chunking.STEPS


@given(
    blocks=st.lists(st.integers(0, 50), min_size=1),
    starts=st.lists(st.integers(0, 500), max_size=8),
    size=st.integers(1, 60),
)
def test_cut_is_slicing(blocks, starts, size):
    wave = np.arange(sum(blocks), dtype=np.float32)
    spans = [(s, s + size) for s in sorted(starts) if s + size <= len(wave)]
    divided = np.split(wave, np.cumsum(blocks)[:-1])
    for (start, stop), part in zip(spans, chunking.cut(iter(divided), spans), strict=True):
        np.testing.assert_array_equal(part, wave[start:stop])


@given(keys=st.lists(st.integers(1, 4)), waiting=st.integers(0, 9))
def test_batches_hold_every_item_once_and_none_waits_for_long(keys, waiting):
    drawn = []

    def segments():
        for i, key in enumerate(keys):
            drawn.append(i)
            yield chunking.Segment(None, None, key, 0, key, 0, i)

    seen = []
    for frames, group in chunking.batches(segments(), lambda frames: frames, waiting):
        assert 0 < len(group) <= frames
        assert {segment.frames for segment in group} == {frames}
        numbers = [segment.recording_id for segment in group]
        if len(drawn) < len(keys):
            assert len(drawn) - 1 - min(numbers) <= waiting
        seen += numbers
    assert sorted(seen) == list(range(len(keys)))


@pytest.mark.parametrize("window", [0, 100, 130])
@pytest.mark.parametrize("samples", [FIELD, 139, 600, 1301, 2_600])
def test_segments_are_all_frames_of_a_recording(samples, window):
    wave = np.arange(samples, dtype=np.float32)
    moments = Length()
    moments.add(wave)
    blocks = iter(np.array_split(wave, 7))
    segments = list(chunker(window).segments(blocks, moments, "recording"))
    times = chunker(window).times(samples)
    at = itertools.accumulate((segment.last - segment.first for segment in segments), initial=0)
    assert [segment.at for segment in segments] == list(at)[:-1]
    middles = [
        segment.wave[t * HOP : t * HOP + FIELD].mean() + 0.5  # the middle of each frame's samples
        for segment in segments
        for t in range(segment.first, segment.last)
    ]
    np.testing.assert_allclose(middles, times, rtol=1e-6)
    assert all(len(segment.wave) == (segment.frames - 1) * HOP + FIELD for segment in segments)
    norms = {segment.norm for segment in segments}  # a window's own norm, or the recording's
    lengths = {min(window, samples - start) for start in range(0, samples - FIELD + 1, window or 1)}
    assert norms == (lengths if window else {samples})


def test_a_recording_that_is_too_short_has_no_frame():
    assert len(chunker().times(FIELD - 1)) == 0
    assert len(chunker(100).times(FIELD - 1)) == 0
