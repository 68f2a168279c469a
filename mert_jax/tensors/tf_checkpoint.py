"""Tensors of a TensorFlow checkpoint, read without TensorFlow.

`.index` is a table (google/leveldb, `doc/table_format.md`) from names to the dtype, shape and place
of each tensor (`tensor_bundle.proto`) in `.data-00000-of-00001`. Checksums are not verified.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes  # noqa: F401 (gives numpy bfloat16)
import numpy as np

from mert_jax.errors import UserError

MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a table
FOOTER = 48
DATA = ".data-00000-of-00001"
NUMBERS = (1, 2, 3, 4, 5, 6, 9, 10, 14, 17, 19, 22, 23)  # tensorflow/core/framework/types.proto
KINDS = "float32 float64 int32 uint8 int16 int8 int64 bool bfloat16 uint16 float16 uint32 uint64"
DTYPES = dict(zip(NUMBERS, map(np.dtype, KINDS.split()), strict=True))


def read_tf_checkpoint(folder: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Return every tensor of the checkpoint `prefix` in `folder`, a pathlib.Path or zipfile.Path.

    Raises UserError for files that are missing, damaged, compressed or in several shards.
    """
    name = f"{folder}/{prefix}.index"
    try:
        index, data = ((folder / (prefix + end)).read_bytes() for end in (".index", DATA))
    except (OSError, KeyError) as e:
        raise UserError(f"{folder} has no TensorFlow checkpoint {name} and {DATA}: {e}") from e
    try:
        return _tensors(index, data)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as e:  # garbled bytes
        raise UserError(f"{name} is not a readable TensorFlow index: {e}") from e


def _tensors(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    if len(index) < FOOTER or int.from_bytes(index[-8:], "little") != MAGIC:
        raise ValueError("it does not end as one")
    *_, end = _varints(index, len(index) - FOOTER, 2)  # of a handle to statistics
    tensors = {}
    for _, handle in _entries(index, index, end):
        for key, value in _entries(index, handle, 0):
            fields = dict(_fields(value))
            if key:
                name = key.decode(errors="replace")  # keys of slices are not text
                tensors[name] = _tensor(name, fields, data)
            elif fields.get(1, 0) != 1:  # the header is the entry without a name
                raise ValueError(f"its tensors are in {fields.get(1, 0)} shards, not in one")
            elif fields.get(2, 0):
                raise ValueError("its tensors are big-endian")
    return tensors


def _tensor(name: str, fields: dict[int, Any], data: bytes) -> np.ndarray:
    """Return the array of an entry: dtype in field 1, shape in 2, offset in 4, bytes in 5."""
    if fields.get(1) not in DTYPES:
        raise ValueError(f"{name} is of dtype {fields.get(1)}, not of numbers")
    sizes = [dict(_fields(x)).get(1, 0) for number, x in _fields(fields.get(2, b"")) if number == 2]
    dtype, start, size = DTYPES[fields[1]], fields.get(4, 0), fields.get(5, 0)
    if size != dtype.itemsize * int(np.prod(sizes, dtype=object)):
        raise ValueError(f"{name} is {dtype}{sizes} in {size} bytes")
    return np.frombuffer(data, dtype, size // dtype.itemsize, start).reshape(sizes)


def _entries(index: bytes, message: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of the block of the index whose handle is in `message` at byte `at`."""
    start, size, _ = _varints(message, at, 2)
    if index[start + size]:
        raise ValueError("it is compressed")
    block = index[start : start + size]
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    if end < 0:
        raise ValueError("a block is shorter than it says")
    while at < end:
        shared, unshared, size, start = _varints(block, at, 3)
        middle, at = start + unshared, start + unshared + size
        if shared > len(key) or at > end:
            raise ValueError("an entry is longer than its block")
        key = key[:shared] + block[start:middle]  # begins as the one before
        yield key, block[middle:at]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the numbers and values (int or bytes) of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _varints(message, at, 1)
        if tag & 7 == 0:
            value, at = _varints(message, at, 1)
        else:
            size, at = _varints(message, at, 1) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        if at > len(message):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, value


def _varints(message: bytes, at: int, count: int) -> tuple[int, ...]:
    """Return `count` numbers stored seven bits a byte, lowest first, and their end."""
    values = []
    for _ in range(count):
        value, end = 0, at
        while end == at or message[end - 1] > 127:
            if end - at > 9:
                raise ValueError("a number is too long")
            value |= (message[end] & 127) << 7 * (end - at)
            end += 1
        values, at = [*values, value], end
    return *values, at
