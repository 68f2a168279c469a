"""Recordings as segments that the student hears: whole, in overlapping chunks, or in windows.

Frames count from the beginning of a file; frame t hears samples hop * t to hop * t + field.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mert_jax.extraction.group_norm import Moments, Norm

STEPS = 8  # padded lengths an octave: at most an eighth longer, 3 % at 5 to 60 s


def chunks(frames: int, length: int, context: int) -> list[tuple[int, int, int, int]]:
    """Cut a file into pieces of `length` frames, or one piece if it is shorter.

    Each piece is (start, stop, first, last): frames [start, stop) to compute, and [first, last) of
    them to keep, with `context` frames on both sides as far as the file has them.
    """
    if frames <= length:
        return [(0, frames, 0, frames)]
    pieces, first = [], 0
    while first < frames:
        # the last piece is as long as the others, so that it needs no program of its own
        start = min(max(first - context, 0), frames - length)
        last = frames if start + length == frames else start + length - context
        pieces.append((start, start + length, first, last))
        first = last
    return pieces


class Segment(NamedTuple):
    """A piece of a recording to embed.

    wave: f32 [n]. norm: of the whole recording or window. frames: in the segment, of which [first,
    last) are kept. at: the first kept frame, counted in the recording.
    """

    wave: np.ndarray
    norm: Norm
    frames: int
    first: int
    last: int
    at: int
    recording_id: Any


class Chunker(NamedTuple):
    """Cuts recordings into segments.

    hop, field: samples between frames and of a frame. chunk, context: frames, as in `chunks`.
    window: samples of clips that count as separate recordings, 0 for none. moments, norm: return
    the empty moments of a wave, and its norm from the full ones.
    """

    hop: int
    field: int
    chunk: int
    context: int
    window: int
    moments: Callable[[], Moments]
    norm: Callable[[Moments], Norm]

    def num_frames(self, samples: int) -> int:
        """Return the number of frames of a wave, 0 if it is too short."""
        return max((samples - self.field) // self.hop + 1, 0)

    def num_samples(self, frames: int) -> int:
        """Return the number of samples that consecutive frames hear."""
        return (frames - 1) * self.hop + self.field

    def windows(self, samples: int) -> list[tuple[int, int]]:
        """Return samples [start, stop) of each window; a last one below a frame is left out."""
        starts = range(0, samples - self.field + 1, self.window)
        return [(start, min(start + self.window, samples)) for start in starts]

    def times(self, samples: int) -> np.ndarray:
        """Return the sample in the middle of each frame of a recording, f64 [T]."""
        spans = self.windows(samples) if self.window else [(0, samples)]
        frames = [b + self.hop * np.arange(self.num_frames(e - b)) for b, e in spans]
        return np.concatenate([np.empty(0), *frames]) + self.field / 2

    def segments(
        self, blocks: Iterable[np.ndarray], moments: Moments, recording_id: Any
    ) -> Iterator[Segment]:
        """Yield the segments of a recording, given its blocks f32 [n] and the moments of all."""
        if self.window:
            spans, at = self.windows(moments.samples), 0
            for wave in cut(blocks, spans):
                own, frames = self.moments(), self.num_frames(len(wave))
                own.add(wave)
                # the last samples may be too few for a frame, but belong to the norm
                heard = wave[: self.num_samples(frames)]
                yield Segment(heard, self.norm(own), frames, 0, frames, at, recording_id)
                at += frames
            return
        pieces = chunks(self.num_frames(moments.samples), self.chunk, self.context)
        spans = ((start * self.hop, self.num_samples(stop)) for start, stop, _, _ in pieces)
        norm = self.norm(moments)
        for (start, stop, first, last), wave in zip(pieces, cut(blocks, spans), strict=True):
            own_range = first - start, last - start
            yield Segment(wave, norm, stop - start, *own_range, first, recording_id)


def cut(blocks: Iterable[np.ndarray], spans: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield samples [start, stop) of each span, in ascending order, from blocks f32 [n].

    Memory holds no more than a span and a block.
    """
    blocks, buffer, begin = iter(blocks), np.empty(0, np.float32), 0
    for start, stop in spans:
        parts, end = [buffer], begin + len(buffer)
        while end < stop:
            parts.append(next(blocks))
            end += len(parts[-1])
        buffer = (np.concatenate(parts) if len(parts) > 1 else buffer)[start - begin :]
        begin = start
        yield buffer[: stop - start]


def bucket(frames: int) -> int:
    """Return the padded length of a piece, one of STEPS an octave, so that few programs exist."""
    step = 1 << max(frames.bit_length() - STEPS.bit_length(), 0)
    return -(-frames // step) * step


def batches(
    items: Iterable[Any], key: Callable[[Any], int], size: Callable[[int], int], waiting: int
) -> Iterator[tuple[int, list[Any]]]:
    """Group items of equal `key`, `size(key)` at a time.

    Groups are smaller at the end, and when an item has let `waiting` others pass.
    """
    groups: dict[int, list[tuple[int, Any]]] = {}
    for count, item in enumerate(items):
        name = key(item)
        groups.setdefault(name, []).append((count, item))
        if len(groups[name]) == size(name):
            yield name, [item for _, item in groups.pop(name)]
        oldest = min(groups, key=lambda name: groups[name][0][0], default=None)
        if oldest is not None and count - groups[oldest][0][0] >= waiting:
            yield oldest, [item for _, item in groups.pop(oldest)]
    for name, group in groups.items():
        yield name, [item for _, item in group]
