"""Embeds audio files side by side: decoded ahead, cut into segments, written when complete."""

import collections
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mert_jax.data.decoding import SkippedFile, decode
from mert_jax.data.preparation.sources import SourceFile
from mert_jax.data.preparation.workers import cpus
from mert_jax.extraction.chunking import Chunker, Segment
from mert_jax.extraction.embedder import Embedder
from mert_jax.extraction.group_norm import Moments
from mert_jax.files import Row

MAX_THREADS = 4  # that decode


class Recording(NamedTuple):
    """A decoded file; one longer than a chunk has no `wave` f32 [N] and is decoded again."""

    source: SourceFile
    sample_rate: int
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
    return Recording(source, header.sample_rate, moments, wave)


def read_ahead(
    read: Callable[[SourceFile], Recording], sources: Iterable[SourceFile]
) -> Iterator[tuple[SourceFile, Future]]:
    """Yield each source with its future Recording, while threads decode the next ones."""
    queue, threads = collections.deque(), min(cpus(), MAX_THREADS)
    pool = ThreadPoolExecutor(threads)
    try:
        for source in sources:
            queue.append((source, pool.submit(read, source)))
            if len(queue) > 2 * threads:
                yield queue.popleft()
        yield from queue
    finally:
        pool.shutdown(cancel_futures=True)


def segments(recording: Recording, chunker: Chunker, sample_rate: int) -> Iterator[Segment]:
    """Yield the segments of a recording. Raises SkippedFile for a file that has become shorter."""
    path, moments = recording.source.path, recording.moments
    if recording.wave is not None:
        yield from chunker.segments([recording.wave], moments, path)
        return
    with decode(path, sample_rate) as (_, blocks):
        yield from chunker.segments(blocks, moments, path)


class StatesFile:
    """Collects the hidden states of a recording in a file at `path`, or their mean in memory.

    No more than a segment of the hidden states is in memory. Raises OSError for a full disk.
    """

    def __init__(self, embedder: Embedder, recording: Recording, path: str, dtype: np.dtype):
        model, samples = embedder.model, recording.moments.samples
        times, seconds = embedder.chunker.times(samples), samples / model.sample_rate
        self.source, self.frames, self.missing = recording.source, len(times), len(times)
        self._row = dict(seconds=seconds, frames=len(times), sample_rate=recording.sample_rate)
        self._path, self._dtype, self._file, self._start = path, dtype, None, 0
        self._arrays = {"layers": np.array(embedder.layers), "frame_rate": model.frame_rate}
        self._sum = 0.0 if embedder.settings.pool == "mean" else None
        if self._sum is None:
            self._arrays["times"] = times / model.sample_rate

    def add(self, segment: Segment, states: np.ndarray) -> None:
        """Add the output of `Embedder.run`. Raises SkippedFile for values too large for `dtype`."""
        self.missing -= segment.last - segment.first
        if self._sum is not None:
            self._sum = self._sum + states.astype(np.float64)
            return
        states = self._cast(states)
        layers, _, width = states.shape
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by finish and discard)
            shape = (layers, self.frames, width)
            header = dict(descr=self._dtype.str, fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(self._file, header)
            self._start = self._file.tell()
        for layer, rows in enumerate(states):
            offset = (layer * self.frames + segment.at) * width * self._dtype.itemsize
            self._file.seek(self._start + offset)
            self._file.write(rows.tobytes())

    def _cast(self, states: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = states.astype(self._dtype)
        if not np.isfinite(cast).all():
            largest = np.abs(states).max()
            raise SkippedFile("overflow", f"{largest:.4g} does not fit into {self._dtype.name}")
        return cast

    def finish(self, output: str, name: str) -> Row:
        """Write the .npz `name` in `output`, and return its row for the log."""
        if self._sum is None:
            self._file.close()
            states = np.load(self._path, mmap_mode="r")
        else:
            states = self._cast(self._sum / self.frames)
        path, packed = os.path.join(output, name), f"{self._path}.npz"
        np.savez(packed, hidden_states=states, **self._arrays)
        self.discard()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(packed, path)
        return self.source._asdict() | {"output": name} | self._row

    def discard(self) -> None:
        if self._file:
            self._file.close()
            os.unlink(self._path)


def embed_files(
    embedder: Embedder, names: Mapping[SourceFile, str], output: str, dtype: np.dtype, bar: tqdm
) -> Iterator[Row | tuple[SourceFile, SkippedFile]]:
    """Yield a row for the log for each source, or the source with the reason why it is skipped.

    The results have `names` in `output`. Raises OSError if they cannot be written.
    """
    chunker, rate = embedder.chunker, embedder.model.sample_rate
    staging = os.path.join(output, ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    os.makedirs(staging)
    started: dict[str, StatesFile] = {}
    failures: list[tuple[SourceFile, SkippedFile]] = []

    def fail(source: SourceFile, error: SkippedFile) -> None:
        if source.path in started:
            started.pop(source.path).discard()
        failures.append((source, error))

    def all_segments() -> Iterator[Segment]:
        # the largest first, so that none of them runs alone at the end
        order = sorted(names, key=lambda source: (-source.size, source.path))
        read = functools.partial(read_recording, chunker=chunker, sample_rate=rate)
        for number, (source, future) in enumerate(read_ahead(read, order)):
            try:
                recording, path = future.result(), os.path.join(staging, str(number))
                started[source.path] = StatesFile(embedder, recording, path, dtype)
                yield from segments(recording, chunker, rate)
            except SkippedFile as e:
                fail(source, e)

    for segment, states in embedder.run(all_segments()):
        if file := started.get(segment.recording_id):  # or it has failed after this segment
            bar.update((segment.last - segment.first) / file.frames * file.source.size)
            try:
                file.add(segment, states)
                if not file.missing:
                    row = file.finish(output, names[file.source])
                    del started[file.source.path]
                    yield row
            except SkippedFile as e:
                fail(file.source, e)
        while failures:
            yield failures.pop()
    yield from failures
    shutil.rmtree(staging)
