"""Waves of clips: each file is decoded once, up to the end of its last clip."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from mert_jax.data import decoding
from mert_jax.data.decoding import SkippedFile
from mert_jax.tasks.task import Clip

SHORTEST = 0.05  # seconds; the receptive field of a frame is 17 ms


def read(clips: Sequence[Clip], sample_rate: int) -> Iterator[tuple[int, np.ndarray | SkippedFile]]:
    """Yield each clip's index with its mono wave f32 [N] or the reason why it has none.

    Neighbouring clips of one file come in the order of their starts.
    """
    for path, group in itertools.groupby(enumerate(clips), key=lambda item: item[1].path):
        members = sorted(group, key=lambda item: item[1].start)
        done = 0
        try:
            with decoding.decode(path, sample_rate) as (_, blocks):
                for wave in _cut(blocks, [clip for _, clip in members], sample_rate):
                    yield members[done][0], wave
                    done += 1
        except SkippedFile as e:
            yield from ((index, e) for index, _ in members[done:])


def _cut(
    blocks: Iterator[np.ndarray], clips: Sequence[Clip], sample_rate: int
) -> Iterator[np.ndarray | SkippedFile]:
    buffer, first = np.zeros(0, np.float32), 0  # samples from number `first` on
    for clip in clips:
        start = round(clip.start * sample_rate)
        stop = math.inf if clip.seconds is None else start + round(clip.seconds * sample_rate)
        pieces, size = [buffer], first + len(buffer)
        while size < stop and (block := next(blocks, None)) is not None:
            pieces.append(block)
            size += len(block)
        buffer = np.concatenate(pieces)[max(0, start - first) :]
        first = max(first, min(start, size))
        wave = buffer[: min(stop - start, len(buffer))]
        if len(wave) < SHORTEST * sample_rate:
            seconds = len(wave) / sample_rate
            yield SkippedFile("too short", f"{seconds:.2f} s from {clip.start:.1f} s on")
        else:
            yield wave.copy()
