"""Records that cannot be used and are replaced: counted, named, and too many of them refused."""

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
ENOUGH = 1000  # clips, before their share says anything
FEW = 8  # clips that say enough when all of them are bad
NAMED = 3  # bad records, where a run stops


class BadRecord(NamedTuple):
    """A record that cannot be used: its dataset, the file it lies in, where, and what is wrong."""

    dataset: str
    shard: str
    index: int
    what: str


def look(source: Any, index: int) -> BadRecord:
    """What is wrong with a record, found out by reading it again."""
    try:
        source[index]
    except records.Fault as fault:
        found = fault
    else:
        found = source.fault(index, "it could not be read, and now it can")
    return BadRecord(source.directory, found.shard, found.index, found.what)


class BadRecords:
    """Counts the clips of the datasets `sources`, and those of them that were replaced.

    Each bad record comes once into WORKDIR/bad_records.jsonl, the count of each batch with replaced
    clips into replaced_clips.jsonl; without a workdir they are only printed. `start` is the batch
    the run begins with: rows of it and later ones are dropped, and the counts are those of the
    batches before. All hosts of a run count, the one that `writes` keeps the files.
    """

    def __init__(
        self,
        workdir: str | None,
        sources: Sequence[Any],
        most: float = 0.01,
        start: int = 0,
        writes: bool = True,
    ):
        self._sources, self._most = sources, most
        self._firsts = list(itertools.accumulate(map(len, sources), initial=0))
        self._next, self._seen = start, set()
        self._named: list[BadRecord] = []
        # the batches before `_next`, of them the last with a count, and that
        self._counted, self._drawn, self.replaced = 0, 0, 0
        self._rows = self._counts = None
        if workdir is None:
            self._counted = start
            return
        paths = [os.path.join(workdir, name) for name in (FILE, COUNTS)]
        keep = lambda row: row["batch"] < start
        bad, counts = (filter(keep, read_jsonl(path)) for path in paths)
        for row in bad:
            self._seen.add(row["record"])
            self._name(BadRecord(**{key: row[key] for key in BadRecord._fields}))
        for row in [*counts][-1:]:
            self._counted = row["batch"] + 1
            self._drawn, self.replaced = row["drawn"], row["replaced"]
        if writes:
            self._rows, self._counts = (JsonlFile(path, keep) for path in paths)

    def note(self, step: int, batch: int, clips: Mapping[str, np.ndarray]) -> None:
        """Count the `clips` of the stream's batch number `batch`, drawn for `step`, of which
        `faulty` is int64 [b]; a batch that was counted before is not counted again.

        Prints a line for each record that was not known to be bad. Raises UserError when more than
        the share `most` of at least 1000 clips, or all of at least 8, were replaced.
        """
        if batch < self._next:
            return
        faulty = np.asarray(clips["faulty"])
        bad = faulty[faulty >= 0]
        self._drawn += (batch + 1 - self._counted) * len(faulty)
        self._counted = self._next = batch + 1
        for record in dict.fromkeys(bad.tolist()):
            if record not in self._seen:
                self._add(step, batch, record)
        if len(bad):
            self.replaced += len(bad)
            if self._counts:
                self._counts.write(dict(batch=batch, drawn=self._drawn, replaced=self.replaced))
        self._judge()

    def _add(self, step: int, batch: int, record: int) -> None:
        dataset = int(np.searchsorted(self._firsts, record, "right")) - 1
        index = record - self._firsts[dataset]
        bad = look(self._sources[dataset], index)
        self._seen.add(record)
        self._name(bad)
        if self._rows:
            self._rows.write(dict(step=step, batch=batch, record=record) | bad._asdict())
        when = f"step {step}: " if self._rows else ""
        print(
            f"{when}record {record} cannot be used, the next one stands in: {_said(bad)}",
            flush=True,
        )

    def _name(self, bad: BadRecord) -> None:
        if len(self._named) < NAMED:
            self._named.append(bad)

    def _judge(self) -> None:
        enough = self._drawn >= (FEW if self.replaced == self._drawn else ENOUGH)
        if not (enough and self.replaced > self._most * self._drawn):
            return
        more = len(self._seen) - len(self._named)
        raise UserError(
            f"{self.replaced} of {self._drawn} clips were of records that cannot be used, "
            f"{self.replaced / self._drawn:.2%} and more than {self._most:.2%}: "
            + "; ".join(map(_said, self._named))
            + (f"; and {more} more" if more else "")
            + ". Copy the dataset again, or make it anew with python -m mert_jax.prepare, or, in "
            "training, raise data.max_faulty"
        )

    def close(self) -> None:
        """Close the files."""
        for file in (self._rows, self._counts):
            if file:
                file.close()


def count_bad_records(
    stream: Any, faults: BadRecords, start: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
    """The batches of a stream that begins with batch `start`, as `faults` has counted them."""
    with contextlib.closing(stream):
        for batch, clips in enumerate(stream, start):
            faults.note(batch + 1, batch, clips)
            yield clips


def _said(bad: BadRecord) -> str:
    return f"{os.path.join(bad.dataset, bad.shard)}, record {bad.index} ({bad.what})"
