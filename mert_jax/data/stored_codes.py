"""Codes of a dataset's tracks, stored beside its audio in DATA/codes/TEACHER/.

Record i of a split holds the codes of audio record i, uint16 [T, K], cut from those of the whole
track: frame t has samples 320 t to 320 (t + 1). codes.json, written last, names the codec and the
dataset.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mert_jax.data import records
from mert_jax.errors import UserError
from mert_jax.teachers.teacher import Teacher

INFO = "codes.json"
DTYPE = np.dtype("<u2")


class CodesInfo(NamedTuple):
    """Content of codes.json.

    fingerprint: of the codec; dataset: fingerprint of the audio; counts: uses of each code, [K][V]
    by split; shards: file names by split.
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
        """Equal for datasets whose codes mean the same."""
        return self.fingerprint, self.books, self.size


def folder(directory: str, teacher: str) -> str:
    """Return the folder of a teacher's codes in a dataset."""
    return os.path.join(directory, "codes", teacher)


def read_info(directory: str, teacher: str) -> CodesInfo | None:
    """Read what a dataset stores of `teacher`, None if nothing.

    Raises UserError for codes of another state of the dataset, and for an unreadable codes.json.
    """
    path = epath.Path(folder(directory, teacher)) / INFO
    if not path.exists():
        return None
    try:
        info = CodesInfo(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} does not describe codes: {e}; {_way_out(directory)}") from e
    dataset = records.metadata(directory)["fingerprint"]
    if info.dataset != dataset:
        raise UserError(
            f"the codes in {path.parent} were stored when {directory} held other tracks "
            f"(fingerprint {info.dataset[:8]}, now {dataset[:8]}); {_way_out(directory)}"
        )
    return info


def stored_teacher(info: CodesInfo) -> Teacher:
    """Return a teacher of which only stored codes exist: `apply` raises UserError."""

    def apply(params: Any, wave: Any) -> Any:
        raise UserError(
            f"a batch lacks the stored codes of {info.teacher}, and there is no checkpoint to "
            f"compute them; set teacher.{info.teacher}.checkpoint"
        )

    return Teacher(apply, (), info.size)


def _way_out(directory: str) -> str:
    return f"run python -m mert_jax.prepare --output={directory} --codes=CHECKPOINT, or remove it"


class CodesSource:
    """Random access to the codes uint16 [T, K] of a split's records, cheap to pickle.

    `lengths` has the records of each file; without it the files are opened to count them. Raises
    UserError if files with all or more than the fraction `max_missing` of the records are missing,
    BadRecordError for a record that cannot be read.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        info: CodesInfo,
        lengths: Sequence[int] = (),
        max_missing: float = 0.0,
    ):
        path, self._info = folder(directory, info.teacher), info
        names = info.shards.get(split, [])
        # files to be counted must all be there
        weights, allowed = (lengths, max_missing) if lengths else ([1] * len(names), 0.0)
        missing, fraction = records.missing_files(path, names, weights, allowed)
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} files of codes are missing, with {fraction:.1%} "
                f"of the records, {os.path.join(path, missing[0])} first; {_way_out(directory)}"
            )
        lengths = lengths or [records.count_records(os.path.join(path, name)) for name in names]
        self._shards = records.Shards(path, names, lengths)
        self._repr = f"Source({path!r}, {names})"

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> np.ndarray:
        stored = self._shards[index]
        if len(stored) % (DTYPE.itemsize * self._info.books):
            reason = f"{len(stored)} bytes are not codes of {self._info.books} codebooks"
            raise self._shards.error(index, reason)
        return np.frombuffer(stored, DTYPE).reshape(-1, self._info.books)

    def check(self, index: int, codes: np.ndarray, samples: int) -> None:
        """Raise BadRecordError if a record's codes do not fit its samples or the codebooks."""
        expected = -(-samples // self._info.hop_length)
        if len(codes) != expected:
            reason = f"{len(codes)} frames of codes for {samples} samples, {expected} frames"
            raise self._shards.error(index, reason)
        if (top := int(codes.max())) >= self._info.size:
            raise self._shards.error(index, f"code {top} of codebooks of {self._info.size}")

    def __repr__(self) -> str:  # grain names a pipeline by its source
        return self._repr


class WithCodes:
    """Adds to each record of `source` its stored codes, one array a teacher.

    Raises BadRecordError for a record that cannot be used, or whose codes do not fit.
    """

    def __init__(self, source: Any, codes: dict[str, CodesSource]):
        self._source, self._codes = source, codes
        self.directory, self.error = source.directory, source.error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, codes = self._source[index], {}
        for name, codes_source in self._codes.items():
            codes[name] = codes_source[index]
            codes_source.check(index, codes[name], len(item["audio"]))
        return {**item, "codes": codes}

    def __repr__(self) -> str:
        return f"WithCodes({self._source!r}, {self._codes!r})"


def attach(
    source: Any, directory: str, split: str, stored: dict[str, CodesInfo], max_missing: float = 0.0
) -> Any:
    """Return `source` with the stored codes of its records, itself if nothing is stored.

    Raises UserError if codes and audio differ in the number of records, most of a few records do
    not fit their codes, or files are missing (see `CodesSource`).
    """
    if not stored:
        return source
    shard_lengths, sources = source.shard_lengths(), {}
    for name, info in stored.items():
        alike = len(info.shards.get(split, [])) == len(shard_lengths)
        lengths = shard_lengths if alike else ()
        sources[name] = CodesSource(directory, split, info, lengths, max_missing)
        if len(sources[name]) != len(source):
            raise UserError(
                f"{name}: {len(sources[name])} records of codes for {len(source)} of audio in "
                f"split {split!r} of {directory}; {_way_out(directory)}"
            )
    joined, errors = WithCodes(source, sources), []
    sample = {int(k) for k in np.linspace(0, len(source) - 1, min(len(source), 8))}
    for index in sorted(sample):
        try:
            joined[index]
        except records.BadRecordError as error:
            errors.append(error)
    if len(errors) > len(sample) / 2:
        raise UserError(
            f"{len(errors)} of {len(sample)} sampled records of {directory} do not fit their "
            f"codes; {errors[0]}; {_way_out(directory)}"
        )
    return joined
