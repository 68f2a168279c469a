"""Files through a model: read, embedded side by side, written as each is complete."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mert_jax.data.decoding import SkippedFile
from mert_jax.data.preparation.sources import SourceFile
from mert_jax.data.preparation.workers import cpus
from mert_jax.extraction import reading
from mert_jax.extraction.chunking import Segment
from mert_jax.extraction.embedder import Embedder
from mert_jax.extraction.states_file import StatesFile

WORKERS = 4  # threads that decode, at most


class ExtractionRun:
    """Called with sources, yields each with its row for the ledger, or why there is none.

    names: of what is written in `output`, by source; staging: a directory for what is not complete;
    tick: called with bytes of a source and seconds of audio that are done.
    """

    def __init__(
        self,
        embedder: Embedder,
        output: str,
        staging: str,
        names: dict[SourceFile, str],
        dtype: np.dtype,
        tick: Callable[[float, float], None],
    ):
        self._embedder, self._output, self._staging = embedder, output, staging
        self._names, self._dtype, self._tick = names, dtype, tick
        self._open: dict[str, tuple[reading.Recording, StatesFile]] = {}
        self._failed: list[tuple[SourceFile, SkippedFile]] = []

    def __call__(
        self, todo: list[SourceFile]
    ) -> Iterator[tuple[SourceFile, dict[str, Any] | SkippedFile]]:
        """OSError where the disk does not take the results."""
        for row, states in self._embedder.run(self._rows(todo)):
            if row.owner in self._open:  # its file may have failed after this piece
                recording, file = self._open[row.owner]
                share = (row.last - row.first) / file.frames
                seconds = recording.moments.samples / self._embedder.model.sample_rate
                self._tick(share * recording.source.size, share * seconds)
                try:
                    file.add(row, states)
                    if not file.missing:
                        del self._open[row.owner]
                        yield recording.source, self._finish(recording, file)
                except SkippedFile as e:
                    self._fail(recording.source, e)
            yield from self._failures()
        yield from self._failures()

    def _rows(self, todo: list[SourceFile]) -> Iterator[Segment]:
        cutter, rate = self._embedder.cutter, self._embedder.model.sample_rate
        read = functools.partial(reading.read, cutter=cutter, sample_rate=rate)
        # the largest first: none of them is left for the end alone
        order = sorted(todo, key=lambda source: (-source.size, source.path))
        decoded = reading.ahead(order, read, min(cpus(), WORKERS))
        for number, (source, future) in enumerate(decoded):
            try:
                recording = future.result()
                frames = len(cutter.times(recording.moments.samples))
                path = os.path.join(self._staging, str(number))
                file = StatesFile(path, frames, self._embedder.settings.pool, self._dtype)
                self._open[source.path] = recording._replace(wave=None), file
                yield from reading.rows(recording, cutter, rate)
            except SkippedFile as e:
                self._fail(source, e)

    def _fail(self, source: SourceFile, error: SkippedFile) -> None:
        if source.path in self._open:
            self._open.pop(source.path)[1].discard()
        self._failed.append((source, error))

    def _failures(self) -> Iterator[tuple[SourceFile, SkippedFile]]:
        while self._failed:
            yield self._failed.pop()

    def _finish(self, recording: reading.Recording, file: StatesFile) -> dict[str, Any]:
        source, samples = recording.source, recording.moments.samples
        name, model = self._names[source], self._embedder.model
        path = os.path.join(self._output, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        times = self._embedder.cutter.times(samples) / model.sample_rate
        arrays = dict(layers=np.array(self._embedder.layers), frame_rate=model.frame_rate)
        if self._embedder.settings.pool == "none":
            arrays["times"] = times
        file.finish(path, **arrays)
        row = dict(output=name, seconds=samples / model.sample_rate, frames=len(times))
        return source._asdict() | row | {"sample_rate": recording.header.sample_rate}
