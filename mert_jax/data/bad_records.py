"""Counts the clips of bad records that were replaced, names the records, and stops at too many."""

import bisect
import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mert_jax.data import records
from mert_jax.errors import UserError
from mert_jax.files import JsonlFile, Row, read_jsonl

FILE = "bad_records.jsonl"
COUNTS = "replaced_clips.jsonl"
MIN_CLIPS = 1000  # before the fraction of replaced clips means anything
NUM_NAMED = 3  # bad records that the error names
BAD_RECORD = "{dataset}/{shard}, record {index} ({what})"


def diagnose(source: Any, index: int) -> Row:
    """Read a record again; return its dataset, its file, its index there, and what is wrong."""
    try:
        source[index]
        error = source.error(index, "it could not be read, and now it can")
    except records.BadRecordError as e:
        error = e
    return dict(dataset=source.directory, shard=error.shard, index=error.index, what=error.reason)


class BadRecords:
    """Counts the clips drawn from `sources` and those of them that were replaced.

    WORKDIR/bad_records.jsonl lists the bad records, replaced_clips.jsonl the batches with replaced
    clips, up to batch `start` of a resumed run. Without a workdir, bad records are only printed.
    """

    def __init__(
        self,
        workdir: str | None,
        sources: Sequence[Any],
        max_fraction: float = 0.01,
        start: int = 0,
        writes: bool = True,
    ):
        self._sources, self._max_fraction, self._start = sources, max_fraction, start
        self._offsets = list(itertools.accumulate(map(len, sources), initial=0))
        # clips drawn up to batch `_next` (exclusive), and those of them that were replaced
        self._next, self._drawn, self.replaced = start, 0, 0
        self._bad: dict[int, Row] = {}
        self._rows = self._counts = None
        if not workdir:
            return

        def before_start(row: Row) -> bool:
            return row["batch"] < start

        paths = [os.path.join(workdir, name) for name in (FILE, COUNTS)]
        rows, counts = (list(filter(before_start, read_jsonl(path))) for path in paths)
        self._bad = {row["record"]: row for row in rows}
        last = counts[-1] if counts else dict(batch=-1, drawn=0, replaced=0)
        self._next, self._drawn, self.replaced = last["batch"] + 1, last["drawn"], last["replaced"]
        if writes:
            self._rows, self._counts = (JsonlFile(path, before_start) for path in paths)

    def note(self, step: int, batch: int, faulty: np.ndarray) -> None:
        """Count the bad records that a batch drawn for `step` replaced, once for each batch.

        `faulty` int32 [B] has their numbers in all sources, and -1 for a clip of a good record.
        Prints new bad records. Raises UserError beyond `max_fraction` of at least 1000 clips.
        """
        if batch < max(self._start, self._next):
            return
        bad = faulty[faulty >= 0].tolist()
        self._drawn += (batch + 1 - self._next) * len(faulty)
        self._next = batch + 1
        for record in dict.fromkeys(bad):
            if record not in self._bad:
                self._add(step, batch, record)
        self.replaced += len(bad)
        if bad and self._counts:
            self._counts.write(dict(batch=batch, drawn=self._drawn, replaced=self.replaced))
        if self._drawn >= MIN_CLIPS and self.replaced > self._max_fraction * self._drawn:
            rows, others = list(self._bad.values())[:NUM_NAMED], len(self._bad) - NUM_NAMED
            named = [BAD_RECORD.format(**row) for row in rows]
            named += [f"and {others} more"] if others > 0 else []
            raise UserError(
                f"{self.replaced} of {self._drawn} clips were of records that cannot be used, "
                f"{self.replaced / self._drawn:.2%} and more than {self._max_fraction:.2%}: "
                f"{'; '.join(named)}. Copy the dataset again, or prepare it again with python -m "
                "mert_jax.prepare, or, in training, raise data.max_faulty"
            )

    def _add(self, step: int, batch: int, record: int) -> None:
        dataset = bisect.bisect_right(self._offsets, record) - 1
        row = diagnose(self._sources[dataset], record - self._offsets[dataset])
        self._bad[record] = row
        if self._rows:
            self._rows.write(dict(step=step, batch=batch, record=record) | row)
        when = f"step {step}: " if self._rows else ""
        bad = f"{when}record {record} cannot be used, the next one replaces it"
        print(f"{bad}: {BAD_RECORD.format(**row)}", flush=True)

    def close(self) -> None:
        for file in filter(None, (self._rows, self._counts)):
            file.close()


def count_bad_records(
    stream: Any, bad_records: BadRecords, start: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the batches of a stream that begins with batch `start`, each counted first."""
    with contextlib.closing(stream):
        for batch, clips in enumerate(stream, start):
            bad_records.note(batch + 1, batch, clips["faulty"])
            yield clips
