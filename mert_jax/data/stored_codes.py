"""Codes of a dataset's tracks, stored beside its audio in DATA/codes/TEACHER/.

Record i of file j holds the codes of that record of the audio, uint16 [T, K], cut from those of the
whole track: frame t has samples 320 t to 320 (t + 1). codes.json is written last.
"""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from mert_jax.data import records
from mert_jax.errors import UserError

INFO = "codes.json"
DTYPE = np.dtype("<u2")


class CodesInfo(NamedTuple):
    """Content of codes.json."""

    teacher: str
    books: int
    size: int
    hop_length: int
    fingerprint: str  # of the codec
    dataset: str  # fingerprint of the audio
    counts: dict[str, list[list[int]]]  # uses of each code, [K][V] by split
    shards: dict[str, list[str]]  # file names by split

    @property
    def codec(self) -> tuple[str, int, int]:
        """Equal for datasets whose codes mean the same."""
        return self.fingerprint, self.books, self.size


def folder(directory: str, teacher: str) -> str:
    """Return the folder of a teacher's codes in a dataset."""
    return os.path.join(directory, "codes", teacher)


def _way_out(directory: str) -> str:
    return f"run python -m mert_jax.prepare --output={directory} --codes=CHECKPOINT, or remove it"


def read_info(directory: str, teacher: str) -> CodesInfo | None:
    """Read what a dataset stores of `teacher`. Raises UserError if its tracks have changed."""
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


class CodesSource(records.Shards):
    """Random access to the serialised codes of a split's records."""

    def __init__(self, source: records.RecordSource, split: str, info: CodesInfo):
        names = info.shards.get(split, [])
        if len(names) != len(source.names):
            raise UserError(
                f"{info.teacher}: {len(names)} files of codes for {len(source.names)} of audio in "
                f"split {split!r} of {source.directory}; {_way_out(source.directory)}"
            )
        super().__init__(folder(source.directory, info.teacher), names, source.lengths)
        self._info = info

    def of_samples(self, index: int, samples: int) -> np.ndarray:
        """Return the codes uint16 [T, K] of a record. Raises BadRecordError if they do not fit."""
        stored, books, size = self[index], self._info.books, self._info.size
        expected = -(-samples // self._info.hop_length)
        if len(stored) != expected * books * DTYPE.itemsize:
            frames = f"{expected} frames of {books} codes ({samples} samples)"
            raise self.error(index, f"{len(stored)} bytes for {frames}")
        codes = np.frombuffer(stored, DTYPE).reshape(-1, books)
        if (top := int(codes.max())) >= size:
            raise self.error(index, f"code {top} of codebooks of {size}")
        return codes


def attach(
    source: records.RecordSource, split: str, stored: Mapping[str, CodesInfo], max_missing: float
) -> None:
    """Add `stored` codes to the records. Raises UserError like `records.open_source`."""
    for name, info in stored.items():
        source.codes[name] = CodesSource(source, split, info)
        source.codes[name].check_files(max_missing, _way_out(source.directory))
