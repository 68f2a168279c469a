"""Recordings as segments that the student hears: whole, in overlapping chunks, or in windows.

Frame t hears samples hop * t to hop * t + field of a recording or window.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.decoding import SkippedFile
from mert_jax.extraction.group_norm import Moments, Norm

STEPS = 8  # padded lengths an octave: at most an eighth longer, 3 % at 5 to 60 s


class Segment(NamedTuple):
    """A piece of a recording, whose frames [first, last) are kept."""

    wave: np.ndarray  # f32 [n]
    norm: Norm  # of the whole recording or window
    frames: int
    first: int
    last: int
    at: int  # frames that earlier pieces keep
    recording_id: Any


class Chunker(NamedTuple):
    """Cuts recordings into segments."""

    hop: int  # samples from one frame to the next
    field: int  # samples that a frame hears
    chunk: int  # frames of a piece
    context: int  # frames on both sides of those of a piece that are kept
    window: int  # samples of clips that count as separate recordings, 0 for none
    moments: Callable[[], Moments]  # of a new wave

    def num_frames(self, samples: int) -> int:
        """Return the number of frames of a wave, 0 if it is too short."""
        return max((samples - self.field) // self.hop + 1, 0)

    def num_samples(self, frames: int) -> int:
        """Return the number of samples that consecutive frames hear."""
        return (frames - 1) * self.hop + self.field

    def pieces(self, samples: int) -> list[tuple[int, int, int, int]]:
        """Return samples [start, stop) of each piece, and its frames [first, last) that are kept.

        A last window shorter than a frame is left out.
        """
        if self.window:
            starts = range(0, samples - self.field + 1, self.window)
            spans = [(start, min(start + self.window, samples)) for start in starts]
            return [(start, stop, 0, self.num_frames(stop - start)) for start, stop in spans]
        frames, pieces, done = self.num_frames(samples), [], 0
        length = min(frames, self.chunk)
        while done < frames:
            # the last piece is as long as the others, so that it needs no program of its own
            start = min(max(done - self.context, 0), frames - length)
            last = length - (self.context if start + length < frames else 0)
            span = start * self.hop, self.num_samples(start + length)
            pieces.append((*span, done - start, last))
            done = start + last
        return pieces

    def times(self, samples: int) -> np.ndarray:
        """Return the sample in the middle of each frame of a recording, f64 [T]."""
        pieces = self.pieces(samples)
        frames = [start + self.hop * np.arange(*kept) for start, _, *kept in pieces]
        return np.concatenate([np.empty(0), *frames]) + self.field / 2

    def segments(
        self, blocks: Iterable[np.ndarray], moments: Moments, recording_id: Any
    ) -> Iterator[Segment]:
        """Yield the segments of a recording, given its blocks f32 [n] and the moments of all."""
        pieces = self.pieces(moments.samples)
        waves = cut(blocks, [piece[:2] for piece in pieces])
        at, norm = 0, None if self.window else moments.norm()
        for wave, (_, _, first, last) in zip(waves, pieces, strict=True):
            if self.window:
                own = self.moments()
                own.add(wave)
                norm = own.norm()
            frames = self.num_frames(len(wave))
            # the last samples of a window may be too few for a frame, but belong to its norm
            heard = wave[: self.num_samples(frames)]
            yield Segment(heard, norm, frames, first, last, at, recording_id)
            at += last - first


def cut(blocks: Iterable[np.ndarray], spans: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield samples [start, stop) of ascending spans, with only a span and a block in memory."""
    blocks, buffer, begin = iter(blocks), np.empty(0, np.float32), 0
    for start, stop in spans:
        parts, end = [buffer], begin + len(buffer)
        while end < stop:
            if (block := next(blocks, None)) is None:
                raise SkippedFile("changed", "shorter when it was read again")
            parts.append(block)
            end += len(block)
        buffer = (np.concatenate(parts) if len(parts) > 1 else buffer)[start - begin :]
        begin = start
        yield buffer[: stop - start]


def bucket(frames: int) -> int:
    """Return the padded length of a piece, one of STEPS an octave, so that few programs exist."""
    step = 1 << max(frames.bit_length() - STEPS.bit_length(), 0)
    return -(-frames // step) * step


def batches(
    segments: Iterable[Segment], size: Callable[[int], int], waiting: int
) -> Iterator[tuple[int, list[Segment]]]:
    """Group segments of one `bucket`, `size(bucket)` at a time, and yield both.

    Groups are smaller at the end, and when a segment has let `waiting` others pass.
    """
    groups: dict[int, tuple[int, list[Segment]]] = {}  # in the order of their first segments
    for count, segment in enumerate(segments):
        frames = bucket(segment.frames)
        group = groups.setdefault(frames, (count, []))[1]
        group.append(segment)
        if len(group) == size(frames):
            yield frames, groups.pop(frames)[1]
        oldest = next(iter(groups), None)
        if groups and count - groups[oldest][0] >= waiting:
            yield oldest, groups.pop(oldest)[1]
    for frames, (_, group) in groups.items():
        yield frames, group
