"""Recordings on their way to a model: decoded ahead, measured, and cut into pieces."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mert_jax.data.decoding import Header, SkippedFile, decode
from mert_jax.data.preparation.sources import SourceFile
from mert_jax.extraction.chunking import Chunker, Segment
from mert_jax.extraction.group_norm import Moments


class Recording(NamedTuple):
    """A file that was decoded once; `wave` f32 [N] is None where it is longer than one piece, to be
    decoded again."""

    source: SourceFile
    header: Header
    moments: Moments
    wave: np.ndarray | None


def ahead(
    sources: Iterable[SourceFile], read: Callable[[SourceFile], Recording], workers: int
) -> Iterator[tuple[SourceFile, Future]]:
    """Each source with what `read` will give for it; so many threads work on the next ones."""
    waiting: collections.deque[tuple[SourceFile, Future]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for source in sources:
                waiting.append((source, pool.submit(read, source)))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read(source: SourceFile, cutter: Chunker, sample_rate: int) -> Recording:
    """Decode a file and take its moments; LeftOut for one that cannot be used."""
    longest = cutter.window or (cutter.chunk - 1) * cutter.hop + cutter.field
    moments, held = cutter.moments(), []
    with decode(source.path, sample_rate) as (header, blocks):
        for block in blocks:
            moments.add(block)
            if moments.samples <= longest:
                held.append(block)
    if moments.samples < cutter.field:
        raise SkippedFile("too short", f"{moments.samples} samples; {cutter.field} make a frame")
    whole = np.concatenate(held) if moments.samples <= longest else None
    return Recording(source, header, moments, whole)


def rows(recording: Recording, cutter: Chunker, sample_rate: int) -> Iterator[Segment]:
    """The pieces of a recording, owned by its name; LeftOut for a file that has changed."""
    source = recording.source
    if recording.wave is not None:
        yield from cutter.rows([recording.wave], recording.moments, source.path)
        return
    with decode(source.path, sample_rate) as (_, blocks):
        again = itertools.chain(blocks, _ended())
        yield from cutter.rows(again, recording.moments, source.path)


def _ended() -> Iterator[np.ndarray]:
    raise SkippedFile("changed", "shorter when it was read again")
    yield
