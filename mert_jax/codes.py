"""Codes of a dataset's tracks, stored beside its audio: DATA/codes/TEACHER/.

Record i of a split's shards holds the codes of audio record i, uint16 [frames, K], cut from those
of the whole track: frame t goes with samples 320 t to 320 (t + 1). codes.json, written last, says
which codec and which dataset they come from.
"""

import functools
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mert_jax import records
from mert_jax.cli import UserError
from mert_jax.teachers import Teacher

INFO = "codes.json"
DTYPE = np.dtype("<u2")


class Info(NamedTuple):
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


def info(directory: str, teacher: str) -> Info | None:
    """What is stored of `teacher`, None where nothing is.

    Raises UserError for codes of another state of the dataset, and for a file that is not ours.
    """
    path = epath.Path(folder(directory, teacher)) / INFO
    if not path.exists():
        return None
    try:
        found = Info(**json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is no description of codes: {e}; {_again(directory)}") from e
    if found.dataset != records.metadata(directory)["fingerprint"]:
        raise UserError(
            f"the codes in {path.parent} were made when {directory} held other tracks (fingerprint "
            f"{found.dataset[:8]}, now {records.metadata(directory)['fingerprint'][:8]}); "
            f"{_again(directory)}"
        )
    return found


def teacher(info: Info) -> Teacher:
    """A teacher whose codes are all stored: it cannot be asked for others."""

    def apply(params: Any, wave: Any) -> Any:
        raise UserError(
            f"a batch lacks the stored codes of {info.teacher}, and there is no checkpoint to "
            f"compute them; set teacher.{info.teacher}.checkpoint"
        )

    return Teacher(apply, (), info.size)


def _again(directory: str) -> str:
    return f"run python -m mert_jax.prepare --output={directory} --codes=CHECKPOINT, or remove it"


class Source:
    """Random access to the codes of a split's records: uint16 [frames, K]; cheap to pickle."""

    def __init__(self, directory: str, split: str, info: Info):
        root = epath.Path(folder(directory, info.teacher))
        self._paths = [str(root / name) for name in info.shards.get(split, [])]
        self._books = info.books
        if missing := [path for path in self._paths if not epath.Path(path).exists()]:
            raise UserError(
                f"{len(missing)} of {len(self._paths)} files of codes are missing, {missing[0]} "
                f"first; {_again(directory)}"
            )

    @functools.cached_property
    def _records(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index], DTYPE).reshape(-1, self._books)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_records"}

    def __repr__(self) -> str:  # grain names a pipeline by its source
        return f"Source({self._paths})"


class WithCodes:
    """A dataset's records with their stored codes: `source` items, and one array a teacher."""

    def __init__(self, source: Any, codes: dict[str, Source]):
        self._source, self._codes = source, codes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        codes = {name: stored[index] for name, stored in self._codes.items()}
        return {**self._source[index], "codes": codes}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"WithCodes({self._source!r}, {self._codes!r})"


def attach(source: Any, directory: str, split: str, stored: dict[str, Info]) -> Any:
    """`source` with the stored codes of its records; `source` itself where there are none.

    Raises UserError where codes and audio differ in the number of records or, in a few of them, of
    frames.
    """
    if not stored:
        return source
    joined = WithCodes(source, {name: Source(directory, split, i) for name, i in stored.items()})
    for name, i in stored.items():
        held = len(joined._codes[name])
        if held != len(source):
            raise UserError(
                f"{name}: {held} records of codes for {len(source)} of audio in split {split!r} of "
                f"{directory}; {_again(directory)}"
            )
        for index in sorted({int(k) for k in np.linspace(0, held - 1, min(held, 8))}):
            item = joined[index]
            frames, samples = len(item["codes"][name]), len(item["audio"])
            if frames != -(-samples // i.hop_length):
                raise UserError(
                    f"{name}: record {index} of {directory} has {frames} frames of codes for "
                    f"{samples} samples, {-(-samples // i.hop_length)} frames; {_again(directory)}"
                )
            if (top := int(item["codes"][name].max())) >= i.size:
                raise UserError(
                    f"{name}: code {top} in record {index} of {directory}, of codebooks of "
                    f"{i.size}; {_again(directory)}"
                )
    return joined
