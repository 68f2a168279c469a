"""Counts the clips of bad records that were replaced, names the records, and stops at too many."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data import records
from mert_jax.errors import UserError
from mert_jax.files import JsonlFile, read_jsonl

FILE = "bad_records.jsonl"
COUNTS = "replaced_clips.jsonl"
MIN_CLIPS = 1000  # before the fraction of replaced clips means anything
MIN_CLIPS_ALL_BAD = 8  # enough to stop if all of them were replaced
NUM_NAMED = 3  # bad records that the error names


class BadRecord(NamedTuple):
    """A record that cannot be used: its dataset, its file, its index there, and the reason."""

    dataset: str
    shard: str
    index: int
    what: str

    def __str__(self) -> str:
        return f"{os.path.join(self.dataset, self.shard)}, record {self.index} ({self.what})"


def diagnose(source: Any, index: int) -> BadRecord:
    """Read a record again and return what is wrong with it."""
    try:
        source[index]
        error = source.error(index, "it could not be read, and now it can")
    except records.BadRecordError as e:
        error = e
    return BadRecord(source.directory, error.shard, error.index, error.reason)


class BadRecords:
    """Counts the clips drawn from `sources` and those of them that were replaced.

    WORKDIR/bad_records.jsonl gets a line for each bad record, replaced_clips.jsonl one for each
    batch with replaced clips. `start` is the first batch of this run: later rows are dropped, and
    the counts continue from those of the batches before. Every host counts; the one that `writes`
    keeps the files. Without a workdir, bad records are only printed.
    """

    def __init__(
        self,
        workdir: str | None,
        sources: Sequence[Any],
        max_fraction: float = 0.01,
        start: int = 0,
        writes: bool = True,
    ):
        self._sources, self._max_fraction = sources, max_fraction
        self._offsets = list(itertools.accumulate(map(len, sources), initial=0))
        self._next_batch, self._seen = start, set()
        self._named: list[BadRecord] = []
        # clips drawn up to batch `_counted` (exclusive), and those of them that were replaced
        self._counted, self._drawn, self.replaced = 0, 0, 0
        self._rows = self._counts = None
        if workdir is None:
            self._counted = start
            return

        def before_start(row: Mapping[str, Any]) -> bool:
            return row["batch"] < start

        paths = [os.path.join(workdir, name) for name in (FILE, COUNTS)]
        rows, counts = (list(filter(before_start, read_jsonl(path))) for path in paths)
        self._seen.update(row["record"] for row in rows)
        fields = [{key: row[key] for key in BadRecord._fields} for row in rows[:NUM_NAMED]]
        self._named = [BadRecord(**values) for values in fields]
        if counts:
            self._counted = counts[-1]["batch"] + 1
            self._drawn, self.replaced = counts[-1]["drawn"], counts[-1]["replaced"]
        if writes:
            self._rows, self._counts = (JsonlFile(path, before_start) for path in paths)

    def note(self, step: int, batch: int, clips: Mapping[str, np.ndarray]) -> None:
        """Count `clips["faulty"]` int64 [B] of a batch drawn for `step`, once for each batch.

        Prints a line for each new bad record. Raises UserError if more than `max_fraction` of at
        least 1000 clips, or all of at least 8, were replaced.
        """
        if batch < self._next_batch:
            return
        faulty = np.asarray(clips["faulty"])
        bad = faulty[faulty >= 0]
        self._drawn += (batch + 1 - self._counted) * len(faulty)
        self._counted = self._next_batch = batch + 1
        for record in dict.fromkeys(bad.tolist()):
            if record not in self._seen:
                self._add(step, batch, record)
        if len(bad):
            self.replaced += len(bad)
            if self._counts:
                self._counts.write(dict(batch=batch, drawn=self._drawn, replaced=self.replaced))
        min_clips = MIN_CLIPS_ALL_BAD if self.replaced == self._drawn else MIN_CLIPS
        if self._drawn >= min_clips and self.replaced > self._max_fraction * self._drawn:
            others = len(self._seen) - len(self._named)
            raise UserError(
                f"{self.replaced} of {self._drawn} clips were of records that cannot be used, "
                f"{self.replaced / self._drawn:.2%} and more than {self._max_fraction:.2%}: "
                + "; ".join(map(str, self._named))
                + (f"; and {others} more" if others else "")
                + ". Copy the dataset again, or prepare it again with python -m mert_jax.prepare, "
                "or, in training, raise data.max_faulty"
            )

    def _add(self, step: int, batch: int, record: int) -> None:
        dataset = int(np.searchsorted(self._offsets, record, "right")) - 1
        bad = diagnose(self._sources[dataset], record - self._offsets[dataset])
        self._seen.add(record)
        if len(self._named) < NUM_NAMED:
            self._named.append(bad)
        when = ""
        if self._rows:
            self._rows.write(dict(step=step, batch=batch, record=record) | bad._asdict())
            when = f"step {step}: "
        print(f"{when}record {record} cannot be used, the next one replaces it: {bad}", flush=True)

    def close(self) -> None:
        """Close the files."""
        for file in (self._rows, self._counts):
            if file:
                file.close()


def count_bad_records(
    stream: Any, bad_records: BadRecords, start: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches of a stream that begins with batch `start`, each counted first."""
    with contextlib.closing(stream):
        for batch, clips in enumerate(stream, start):
            bad_records.note(batch + 1, batch, clips)
            yield clips
