"""Waves of clips: each file is decoded once, up to the end of its last clip."""

import itertools
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
                for index, wave in _cut(blocks, members, sample_rate):
                    yield index, wave
                    done += 1
        except SkippedFile as e:
            for index, _ in members[done:]:
                yield index, e


def _cut(
    blocks: Iterator[np.ndarray], members: list[tuple[int, Clip]], sample_rate: int
) -> Iterator[tuple[int, np.ndarray | SkippedFile]]:
    buffer, first = np.zeros(0, np.float32), 0  # samples from number `first` on
    for index, clip in members:
        start = round(clip.start * sample_rate)
        stop = None if clip.seconds is None else start + round(clip.seconds * sample_rate)
        pieces = [buffer]
        size = first + len(buffer)
        while stop is None or size < stop:
            block = next(blocks, None)
            if block is None:
                break
            pieces.append(block)
            size += len(block)
        buffer = np.concatenate(pieces)[max(0, start - first) :]
        first = max(first, min(start, size))
        wave = buffer[: None if stop is None else stop - start]
        if len(wave) < SHORTEST * sample_rate:
            seconds = len(wave) / sample_rate
            yield index, SkippedFile("too short", f"{seconds:.2f} s from {clip.start:.1f} s on")
        else:
            yield index, wave.copy()
