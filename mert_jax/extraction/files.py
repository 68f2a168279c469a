"""Embeds audio files side by side: decoded ahead, cut into segments, written when complete."""

import collections
import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data.decoding import Header, SkippedFile, decode
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
    sources: Iterable[SourceFile], chunker: Chunker, sample_rate: int
) -> Iterator[tuple[SourceFile, Future]]:
    """Yield each source with its future Recording, while threads decode the next ones."""
    queue: collections.deque[tuple[SourceFile, Future]] = collections.deque()
    threads = min(cpus(), MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for source in sources:
                future = pool.submit(read_recording, source, chunker, sample_rate)
                queue.append((source, future))
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


class StatesFile:
    """Collects hidden states [layers, frames, D] in a file at `path`, or their mean in memory.

    No more than a segment of the hidden states is in memory. Raises OSError for a full disk.
    """

    def __init__(self, path: str, frames: int, pool: str, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self.frames, self.missing = frames, frames
        self._sum = 0.0 if pool == "mean" else None
        self._file, self._start = None, 0

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
        for layer in range(layers):
            offset = (layer * self.frames + segment.at) * width * self._dtype.itemsize
            self._file.seek(self._start + offset)
            self._file.write(states[layer].tobytes())

    def _cast(self, states: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = states.astype(self._dtype)
        if not np.isfinite(cast).all():
            largest = np.abs(states).max()
            raise SkippedFile("overflow", f"{largest:.4g} does not fit into {self._dtype.name}")
        return cast

    def finish(self, path: str, **arrays: Any) -> None:
        """Write the .npz at `path`, of the hidden states and other `arrays`."""
        if self._sum is not None:
            arrays = {"hidden_states": self._cast(self._sum / self.frames), **arrays}
        packed = f"{self._path}.npz"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            if self._file:
                self._file.close()
                archive.write(self._path, "hidden_states.npy")
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array))
        self.discard()
        os.replace(packed, path)

    def discard(self) -> None:
        """Remove the temporary file."""
        if self._file:
            self._file.close()
            os.unlink(self._path)


def embed_files(
    embedder: Embedder,
    sources: Sequence[SourceFile],
    names: Mapping[SourceFile, str],
    output: str,
    staging: str,
    dtype: np.dtype,
    on_progress: Callable[[float, float], None],
) -> Iterator[tuple[SourceFile, Row | SkippedFile]]:
    """Yield each source with its row for the log, or with the reason why it is skipped.

    names: of the results in `output`. on_progress: called with the bytes of a source and the
    seconds of audio that are done. Raises OSError if the results cannot be written.
    """
    chunker, rate = embedder.chunker, embedder.model.sample_rate
    started: dict[str, tuple[Recording, StatesFile]] = {}
    failures: list[tuple[SourceFile, SkippedFile]] = []

    def fail(source: SourceFile, error: SkippedFile) -> None:
        if source.path in started:
            started.pop(source.path)[1].discard()
        failures.append((source, error))

    def all_segments() -> Iterator[Segment]:
        # the largest first, so that none of them runs alone at the end
        order = sorted(sources, key=lambda source: (-source.size, source.path))
        for number, (source, future) in enumerate(read_ahead(order, chunker, rate)):
            try:
                recording = future.result()
                frames = len(chunker.times(recording.moments.samples))
                path = os.path.join(staging, str(number))
                file = StatesFile(path, frames, embedder.settings.pool, dtype)
                started[source.path] = recording._replace(wave=None), file
                yield from segments(recording, chunker, rate)
            except SkippedFile as e:
                fail(source, e)

    for segment, states in embedder.run(all_segments()):
        if segment.recording_id in started:  # or the file has failed after this segment
            recording, file = started[segment.recording_id]
            source, seconds = recording.source, recording.moments.samples / rate
            share = (segment.last - segment.first) / file.frames
            on_progress(share * source.size, share * seconds)
            try:
                file.add(segment, states)
                if not file.missing:
                    row = _finish(embedder, recording, file, output, names[source])
                    del started[source.path]
                    yield source, row
            except SkippedFile as e:
                fail(source, e)
        while failures:
            yield failures.pop()
    yield from failures


def _finish(
    embedder: Embedder, recording: Recording, file: StatesFile, output: str, name: str
) -> Row:
    samples, rate = recording.moments.samples, embedder.model.sample_rate
    path = os.path.join(output, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    arrays = {"layers": np.array(embedder.layers), "frame_rate": embedder.model.frame_rate}
    if embedder.settings.pool == "none":
        arrays["times"] = embedder.chunker.times(samples) / rate
    file.finish(path, **arrays)
    row = dict(output=name, seconds=samples / rate, frames=file.frames)
    return recording.source._asdict() | row | {"sample_rate": recording.header.sample_rate}
