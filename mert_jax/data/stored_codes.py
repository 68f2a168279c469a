"""Codes of a dataset's tracks, stored beside its audio: DATA/codes/TEACHER/.

Record i of a split's shards holds the codes of audio record i, uint16 [frames, K], cut from those
of the whole track: frame t goes with samples 320 t to 320 (t + 1). codes.json, written last, says
which codec and which dataset they come from.
"""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mert_jax.data import records
from mert_jax.errors import UserError
from mert_jax.teachers.teacher import Teacher

INFO = "codes.json"
DTYPE = np.dtype("<u2")


class CodesInfo(NamedTuple):
    """What codes.json says.

    fingerprint: of the codec; dataset: of the audio; counts: how often each code comes, by split,
    [K][V]; shards: file names by split.
    """

    teacher: str
    books: int
    size: int
    hop_length: int
    fingerprint: str
    dataset: str
    counts: dict[str, list[list[int]]]
    shards: dict[str, list[str]]

    @property
    def codec(self) -> tuple[str, int, int]:
        """What two datasets have in common whose codes mean the same."""
        return self.fingerprint, self.books, self.size


def folder(directory: str, teacher: str) -> str:
    """Where a dataset keeps a teacher's codes."""
    return os.path.join(directory, "codes", teacher)


def read_info(directory: str, teacher: str) -> CodesInfo | None:
    """What is stored of `teacher`, None where nothing is.

    Raises UserError for codes of another state of the dataset, and for a file that is not ours.
    """
    path = epath.Path(folder(directory, teacher)) / INFO
    if not path.exists():
        return None
    try:
        found = CodesInfo(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is no description of codes: {e}; {_again(directory)}") from e
    if found.dataset != records.metadata(directory)["fingerprint"]:
        raise UserError(
            f"the codes in {path.parent} were made when {directory} held other tracks (fingerprint "
            f"{found.dataset[:8]}, now {records.metadata(directory)['fingerprint'][:8]}); "
            f"{_again(directory)}"
        )
    return found


def stored_teacher(info: CodesInfo) -> Teacher:
    """A teacher whose codes are all stored: it cannot be asked for others."""

    def apply(params: Any, wave: Any) -> Any:
        raise UserError(
            f"a batch lacks the stored codes of {info.teacher}, and there is no checkpoint to "
            f"compute them; set teacher.{info.teacher}.checkpoint"
        )

    return Teacher(apply, (), info.size)


def _again(directory: str) -> str:
    return f"run python -m mert_jax.prepare --output={directory} --codes=CHECKPOINT, or remove it"


class CodesSource:
    """Random access to the codes of a split's records: uint16 [frames, K]; cheap to pickle.

    `lengths` are the records of each file (none: the files are asked). Raises UserError where files
    with more than the share `max_missing` of the records, or all of them, are missing, and Fault
    for a record that cannot be read.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        info: CodesInfo,
        lengths: Sequence[int] = (),
        max_missing: float = 0.0,
    ):
        self._folder, self._info = folder(directory, info.teacher), info
        self._names = info.shards.get(split, [])
        known = lengths or [1] * len(self._names)  # none may be missing if they are to be asked
        lost, share = records.missing(self._folder, self._names, known, max_missing)
        if lost:
            raise UserError(
                f"{len(lost)} of {len(self._names)} files of codes are missing, with {share:.1%} "
                f"of the records, {os.path.join(self._folder, lost[0])} first; {_again(directory)}"
            )
        self._lengths = lengths or [
            records.count(os.path.join(self._folder, name)) for name in self._names
        ]

    @functools.cached_property
    def _shards(self) -> records.Shards:
        return records.Shards(self._folder, self._names, self._lengths)

    def __len__(self) -> int:
        return sum(self._lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        stored = self._shards[index]
        if len(stored) % (DTYPE.itemsize * self._info.books):
            what = f"{len(stored)} bytes are no codes of {self._info.books} codebooks"
            raise self._shards.fault(index, what)
        return np.frombuffer(stored, DTYPE).reshape(-1, self._info.books)

    def check(self, index: int, found: np.ndarray, samples: int) -> None:
        """Raise Fault if `found`, the codes of a record, are not those of so many samples or not
        all in the codebooks."""
        expected = -(-samples // self._info.hop_length)
        if len(found) != expected:
            what = f"{len(found)} frames of codes for {samples} samples, {expected} frames"
            raise self._shards.fault(index, what)
        if (top := int(found.max())) >= self._info.size:
            raise self._shards.fault(index, f"code {top} of codebooks of {self._info.size}")

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_shards"}

    def __repr__(self) -> str:  # grain names a pipeline by its source
        return f"Source({self._folder!r}, {self._names})"


class WithCodes:
    """A dataset's records with their stored codes: `source` items, and one array a teacher.

    Raises Fault for a record that cannot be used, or whose codes are not its own.
    """

    def __init__(self, source: Any, codes: dict[str, CodesSource]):
        self._source, self._codes = source, codes

    @property
    def directory(self) -> str:
        """The dataset's."""
        return self._source.directory

    def fault(self, index: int, what: str) -> records.Fault:
        """What is wrong with a record of audio."""
        return self._source.fault(index, what)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, found = self._source[index], {}
        for name, stored in self._codes.items():
            found[name] = stored[index]
            stored.check(index, found[name], len(item["audio"]))
        return {**item, "codes": found}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"WithCodes({self._source!r}, {self._codes!r})"


def attach(
    source: Any, directory: str, split: str, stored: dict[str, CodesInfo], max_missing: float = 0.0
) -> Any:
    """`source` with the stored codes of its records; `source` itself where there are none.

    Raises UserError where codes and audio differ in the number of records, where more than half of
    a few records cannot be used with their codes, and where files of codes are missing as `Source`
    says.
    """
    if not stored:
        return source
    shards, held = source.shard_lengths(), {}
    for name, i in stored.items():
        alike = len(i.shards.get(split, [])) == len(shards)
        held[name] = CodesSource(directory, split, i, shards if alike else (), max_missing)
        if len(held[name]) != len(source):
            raise UserError(
                f"{name}: {len(held[name])} records of codes for {len(source)} of audio in split "
                f"{split!r} of {directory}; {_again(directory)}"
            )
    joined, faults = WithCodes(source, held), []
    looked = {int(k) for k in np.linspace(0, len(source) - 1, min(len(source), 8))}
    for index in sorted(looked):
        try:
            joined[index]
        except records.Fault as fault:
            faults.append(fault)
    if len(faults) > len(looked) / 2:
        raise UserError(
            f"{len(faults)} of {len(looked)} records of {directory} that were looked at do not go "
            f"with their codes; {faults[0]}; {_again(directory)}"
        )
    return joined
