"""Embeds audio files side by side: decoded ahead, cut into segments, written when complete."""

import collections
import itertools
import os
import zipfile
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
        # the largest first, so that none of them runs alone at the end
        order = sorted(sources, key=lambda source: (-source.size, source.path))
        for number, (source, future) in enumerate(read_ahead(order, chunker, rate)):
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
