"""Writes TensorFlow checkpoints of several blocks for tests."""

import struct
from pathlib import Path

import numpy as np

from mert_jax.tensors.tf_checkpoint import DTYPES, MAGIC

NUMBER_OF = {np.dtype(dtype): number for number, dtype in DTYPES.items()}


def write(
    folder: Path,
    tensors: dict[str, np.ndarray],
    prefix: str = "",
    header: bytes = b"\x08\x01",  # one shard
    block_type: int = 0,
    per_block: int = 5,
) -> None:
    """Write `tensors` as TensorFlow would, except that checksums are zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, data = [(b"", header)], b""
    for name in sorted(tensors):
        x = np.asarray(tensors[name])
        dims = b"".join(_bytes(2, _number(1, size)) for size in x.shape)
        about = _number(1, NUMBER_OF[x.dtype]) + _bytes(2, dims) + _number(4, len(data))
        about += _number(5, x.nbytes) + b"\x35" + bytes(4)  # field 6, of a checksum
        entries.append((name.encode(), about))
        data += x.tobytes()
    file, handles = b"", []
    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        file, handle = _append(file, part, block_type)
        handles.append((part[-1][0] + b"~", handle))
    file, statistics = _append(file, [], 0)
    file, index = _append(file, handles, 0)
    file += (statistics + index).ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    (folder / f"{prefix}.index").write_bytes(file)
    (folder / f"{prefix}.data-00000-of-00001").write_bytes(data)


def _append(file: bytes, entries: list[tuple[bytes, bytes]], kind: int) -> tuple[bytes, bytes]:
    """Return `file` with a block appended, and the block's handle."""
    block, last = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), 0)
        block += _varint(shared) + _varint(len(key) - shared) + _varint(len(value))
        block += key[shared:] + value
        last = key
    block += struct.pack("<II", 0, 1)
    handle = _varint(len(file)) + _varint(len(block))
    return file + block + bytes([kind]) + bytes(4), handle


def _varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded, value = encoded + bytes([value & 127 | 128]), value >> 7
    return encoded + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
