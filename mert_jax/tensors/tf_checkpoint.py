"""Tensors of a TensorFlow checkpoint, read without TensorFlow.

A checkpoint is two files: `.index`, a sorted table from names to the dtype, shape and place of each
tensor, and `.data-00000-of-00001`, their bytes one after the other (tensorflow,
`tensorflow/core/protobuf/tensor_bundle.proto`). The table is LevelDB's (google/leveldb,
`doc/table_format.md`). Checksums are not verified; sizes have to agree.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from mert_jax.errors import UserError

MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a table
FOOTER = 48
DATA = ".data-00000-of-00001"
DTYPES = {  # tensorflow/core/framework/types.proto
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    17: np.uint16,
    19: np.float16,
    22: np.uint32,
    23: np.uint64,
}


def read_tf_checkpoint(folder: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Return every tensor of the checkpoint `prefix` in `folder`, by name.

    folder: a pathlib.Path, or a zipfile.Path inside an archive

    Raises UserError for files that are missing, cut short, compressed, big-endian, in several
    shards or something else, and for tensors that are not numbers.
    """
    try:
        index, data = ((folder / (prefix + end)).read_bytes() for end in (".index", DATA))
    except (OSError, KeyError) as e:
        raise UserError(
            f"{folder} has no TensorFlow checkpoint ({prefix}.index, {prefix}{DATA}): {e}"
        ) from e
    try:
        return _tensors(index, data)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as e:  # garbled bytes
        raise UserError(f"{folder}/{prefix}.index is no readable TensorFlow index: {e}") from e


def _tensors(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    if len(index) < FOOTER or int.from_bytes(index[-8:], "little") != MAGIC:
        raise ValueError("it does not end as one")
    *_, end = _varints(index, len(index) - FOOTER, 2)  # of a handle to statistics
    tensors = {}
    for _, handle in _entries(_block(index, index, end)):
        for key, value in _entries(_block(index, handle, 0)):
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
    if 7 in fields:
        raise ValueError(f"{name} is in slices")
    sizes = [dict(_fields(x)).get(1, 0) for number, x in _fields(fields.get(2, b"")) if number == 2]
    if any(size >= 1 << 63 for size in sizes):  # negative: unknown
        raise ValueError("a tensor has no shape")
    dtype, start, size = np.dtype(DTYPES[fields[1]]), fields.get(4, 0), fields.get(5, 0)
    if size != dtype.itemsize * int(np.prod(sizes, dtype=object)):
        raise ValueError(f"{name} is {dtype}{sizes} in {size} bytes")
    if start + size > len(data):
        raise ValueError(f"{name} ends at byte {start + size}, its file at {len(data)}")
    return np.frombuffer(data, dtype, size // dtype.itemsize, start).reshape(sizes)


def _block(index: bytes, message: bytes, at: int) -> bytes:
    """Return the block of the index whose handle is in `message` at byte `at`."""
    start, size, _ = _varints(message, at, 2)
    if start + size >= len(index) - FOOTER:
        raise ValueError("it is cut short")
    if index[start + size]:
        raise ValueError("it is compressed")
    return index[start : start + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values; each key shares its first bytes with the previous key."""
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    if end < 0:
        raise ValueError("a block is shorter than it says")
    while at < end:
        shared, unshared, size, start = _varints(block, at, 3)
        middle, at = start + unshared, start + unshared + size
        if shared > len(key) or at > end:
            raise ValueError("an entry is longer than its block")
        key = key[:shared] + block[start:middle]
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
            if at + size > len(message):
                raise ValueError("a field is longer than its message")
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _varints(message: bytes, at: int, count: int) -> tuple[int, ...]:
    """Return `count` numbers stored seven bits a byte, lowest first, and their end."""
    values = []
    for _ in range(count):
        value = shift = 0
        while not shift or message[at - 1] > 127:
            if shift > 63:
                raise ValueError("a number is too long")
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
        values.append(value)
    return *values, at
