"""How a file is cut so that the student can hear it: whole, in overlapping chunks, or in windows.

Frames count from the file's beginning; frame t hears samples hop t to hop t + field.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mert_jax.extraction.group_norm import Moments, Norm

STEPS = 8  # lengths an octave that pieces are padded to: at most an eighth more, 3 % at 5 to 60 s


class Piece(NamedTuple):
    """Frames [start, stop) to compute, and [first, last) of them to keep."""

    start: int
    stop: int
    first: int
    last: int


def chunks(frames: int, length: int, context: int) -> list[Piece]:
    """Cut a file of so many frames into pieces of `length`, every frame with `context` frames of
    its piece on each side, as far as the file has them; a file no longer than `length` is one."""
    if frames <= length:
        return [Piece(0, frames, 0, frames)]
    found, kept = [], 0
    while kept < frames:
        # the last one is as long as the others: it hears more, and needs no program of its own
        start = min(max(kept - context, 0), frames - length)
        last = frames if start + length == frames else start + length - context
        found.append(Piece(start, start + length, kept, last))
        kept = last
    return found


class Segment(NamedTuple):
    """A piece on its way: its samples f32 [n], their norm and number of frames, which of these to
    keep, and where in its recording, `owner`, they belong."""

    wave: np.ndarray
    norm: Norm
    frames: int
    first: int
    last: int
    at: int
    owner: Any


class Chunker(NamedTuple):
    """How recordings are cut.

    hop, field: samples from frame to frame, and of a frame; chunk, context: frames, as in `chunks`;
    window: samples of clips that count as recordings of their own, 0 for none; moments, norm: make
    a wave's empty moments, and its norm of the full ones.
    """

    hop: int
    field: int
    chunk: int
    context: int
    window: int
    moments: Callable[[], Moments]
    norm: Callable[[Moments], Norm]

    def windows(self, samples: int) -> list[tuple[int, int]]:
        """Samples of each window; a last one too short for a frame is left out."""
        starts = range(0, samples - self.field + 1, self.window)
        return [(start, min(start + self.window, samples)) for start in starts]

    def times(self, samples: int) -> np.ndarray:
        """The sample in the middle of each frame that a recording of so many has, f64 [T]; () for
        one that is too short."""
        spans = self.windows(samples) if self.window else [(0, samples)]
        frames = [
            start + np.arange(max((stop - start - self.field) // self.hop + 1, 0)) * self.hop
            for start, stop in spans
        ]
        return np.concatenate([np.empty(0), *frames]) + self.field / 2

    def rows(self, blocks: Iterable[np.ndarray], moments: Moments, owner: Any) -> Iterator[Segment]:
        """The pieces of a recording, of its blocks f32 [n] and the moments of all of them."""
        count = lambda samples: (samples - self.field) // self.hop + 1
        if self.window:
            at = 0
            for wave in cut(blocks, self.windows(moments.samples)):
                own, frames = self.moments(), count(len(wave))
                own.add(wave)
                # its last samples may be too few for a frame, but belong to its norm
                heard = wave[: (frames - 1) * self.hop + self.field]
                yield Segment(heard, self.norm(own), frames, 0, frames, at, owner)
                at += frames
            return
        found, norm = chunks(count(moments.samples), self.chunk, self.context), self.norm(moments)
        ends = ((p.start * self.hop, (p.stop - 1) * self.hop + self.field) for p in found)
        for piece, wave in zip(found, cut(blocks, ends), strict=True):
            first, last = piece.first - piece.start, piece.last - piece.start
            yield Segment(wave, norm, piece.stop - piece.start, first, last, piece.first, owner)


def cut(blocks: Iterable[np.ndarray], spans: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Samples [start, stop) of each span, in ascending order, from a file's blocks f32 [n]; no more
    than a span and a block are held."""
    blocks, held, begin = iter(blocks), np.empty(0, np.float32), 0
    for start, stop in spans:
        arrived, end = [held], begin + len(held)
        while end < stop:
            arrived.append(next(blocks))
            end += len(arrived[-1])
        held = np.concatenate(arrived) if len(arrived) > 1 else held
        held = held[start - begin :]
        begin = start
        yield held[: stop - start]


def bucket(frames: int) -> int:
    """The number of frames that a piece is padded to, of `STEPS` an octave: few programs."""
    step = 1 << max(frames.bit_length() - STEPS.bit_length(), 0)
    return -(-frames // step) * step


def batches(
    rows: Iterable[Any], key: Callable[[Any], int], size: Callable[[int], int], waiting: int
) -> Iterator[tuple[int, list[Any]]]:
    """Rows of one `key` together, `size(key)` of them or, at the end and where a row has let
    `waiting` others pass, fewer."""
    groups: dict[int, list[tuple[int, Any]]] = {}
    for count, row in enumerate(rows):
        group = groups.setdefault(key(row), [])
        group.append((count, row))
        if len(group) == size(key(row)):
            yield key(row), [row for _, row in groups.pop(key(row))]
        oldest = min(groups, key=lambda k: groups[k][0][0], default=None)
        if oldest is not None and count - groups[oldest][0][0] >= waiting:
            yield oldest, [row for _, row in groups.pop(oldest)]
    for name, group in groups.items():
        yield name, [row for _, row in group]
