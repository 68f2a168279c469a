"""Embeds audio files side by side: decoded ahead, cut into segments, written when complete."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.decoding import Header, SkippedFile, decode
from mert_jax.data.preparation.sources import SourceFile
from mert_jax.data.preparation.workers import cpus
from mert_jax.extraction.chunking import Chunker, Segment
from mert_jax.extraction.embedder import Embedder
from mert_jax.extraction.group_norm import Moments
from mert_jax.extraction.states_file import StatesFile

MAX_THREADS = 4  # that decode


class Recording(NamedTuple):
    """A decoded file; one longer than a chunk has no `wave` f32 [N] and is decoded again."""

    source: SourceFile
    header: Header
    moments: Moments
    wave: np.ndarray | None


def read_recording(source: SourceFile, chunker: Chunker, sample_rate: int) -> Recording:
    """Decode a file and take its moments. Raises SkippedFile if it cannot be used."""
    longest = chunker.window or chunker.num_samples(chunker.chunk)
    moments, blocks = chunker.moments(), []
    with decode(source.path, sample_rate) as (header, decoded):
        for block in decoded:
            moments.add(block)
            if moments.samples <= longest:
                blocks.append(block)
    if moments.samples < chunker.field:
        raise SkippedFile("too short", f"{moments.samples} samples; {chunker.field} make a frame")
    wave = np.concatenate(blocks) if moments.samples <= longest else None
    return Recording(source, header, moments, wave)


def read_ahead(
    sources: Iterable[SourceFile], read: Callable[[SourceFile], Recording], threads: int
) -> Iterator[tuple[SourceFile, Future]]:
    """Yield each source with the future result of `read`, while threads work on the next ones."""
    queue: collections.deque[tuple[SourceFile, Future]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for source in sources:
                queue.append((source, pool.submit(read, source)))
                if len(queue) > 2 * threads:
                    yield queue.popleft()
            yield from queue
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def segments(recording: Recording, chunker: Chunker, sample_rate: int) -> Iterator[Segment]:
    """Yield the segments of a recording. Raises SkippedFile for a file that has become shorter."""
    path, moments = recording.source.path, recording.moments
    if recording.wave is not None:
        yield from chunker.segments([recording.wave], moments, path)
        return
    with decode(path, sample_rate) as (_, blocks):
        yield from chunker.segments(itertools.chain(blocks, _ended()), moments, path)


def _ended() -> Iterator[np.ndarray]:
    raise SkippedFile("changed", "shorter when it was read again")
    yield


class FileRunner:
    """Yields each source with its row for the log, or the SkippedFile that says why there is none.

    names: of the results in `output`, by source. on_progress: called with the bytes of a source and
    the seconds of audio that are done. Calls raise OSError if the results cannot be written.
    """

    def __init__(
        self,
        embedder: Embedder,
        output: str,
        staging: str,
        names: dict[SourceFile, str],
        dtype: np.dtype,
        on_progress: Callable[[float, float], None],
    ):
        self._embedder, self._output, self._staging = embedder, output, staging
        self._names, self._dtype, self._on_progress = names, dtype, on_progress
        self._open: dict[str, tuple[Recording, StatesFile]] = {}
        self._outcomes: list[tuple[SourceFile, dict[str, Any] | SkippedFile]] = []

    def __call__(
        self, sources: list[SourceFile]
    ) -> Iterator[tuple[SourceFile, dict[str, Any] | SkippedFile]]:
        for segment, states in self._embedder.run(self._segments(sources)):
            self._add(segment, states)
            while self._outcomes:
                yield self._outcomes.pop()
        yield from self._outcomes

    def _segments(self, sources: list[SourceFile]) -> Iterator[Segment]:
        chunker, rate = self._embedder.chunker, self._embedder.model.sample_rate
        read = functools.partial(read_recording, chunker=chunker, sample_rate=rate)
        # the largest first, so that none of them runs alone at the end
        order = sorted(sources, key=lambda source: (-source.size, source.path))
        for number, (source, future) in enumerate(
            read_ahead(order, read, min(cpus(), MAX_THREADS))
        ):
            try:
                recording = future.result()
                frames = len(chunker.times(recording.moments.samples))
                path = os.path.join(self._staging, str(number))
                file = StatesFile(path, frames, self._embedder.settings.pool, self._dtype)
                self._open[source.path] = recording._replace(wave=None), file
                yield from segments(recording, chunker, rate)
            except SkippedFile as e:
                self._fail(source, e)

    def _add(self, segment: Segment, states: np.ndarray) -> None:
        if segment.recording_id not in self._open:  # the file failed after this segment
            return
        recording, file = self._open[segment.recording_id]
        share = (segment.last - segment.first) / file.frames
        seconds = recording.moments.samples / self._embedder.model.sample_rate
        self._on_progress(share * recording.source.size, share * seconds)
        try:
            file.add(segment, states)
            if not file.missing:
                self._finish(recording, file)
        except SkippedFile as e:
            self._fail(recording.source, e)

    def _fail(self, source: SourceFile, error: SkippedFile) -> None:
        if source.path in self._open:
            self._open.pop(source.path)[1].discard()
        self._outcomes.append((source, error))

    def _finish(self, recording: Recording, file: StatesFile) -> None:
        source, samples = recording.source, recording.moments.samples
        embedder, rate = self._embedder, self._embedder.model.sample_rate
        path = os.path.join(self._output, self._names[source])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        arrays = {"layers": np.array(embedder.layers), "frame_rate": embedder.model.frame_rate}
        if embedder.settings.pool == "none":
            arrays["times"] = embedder.chunker.times(samples) / rate
        file.finish(path, **arrays)
        del self._open[source.path]
        row = dict(output=self._names[source], seconds=samples / rate, frames=file.frames)
        row = source._asdict() | row | {"sample_rate": recording.header.sample_rate}
        self._outcomes.append((source, row))
