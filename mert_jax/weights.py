"""Tensors by name, from the files others keep them in: safetensors, and torch's without torch.

A torch file is a pickle, and a pickle may call any function it names. Here it may name tensors,
their storage and plain containers; everything else is refused.
"""

import collections
import os
import pickle
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mert_jax.cli import UserError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # files from before torch 1.6


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file or of a state dict that torch saved, by name.

    Raises UserError for a file that is missing, cut short, something else, or that names a function
    which is none of torch's own for tensors.
    """
    if os.fspath(path).endswith(".safetensors"):
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is no readable safetensors file: {e}") from e
    content = read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    if odd := [name for name, x in content.items() if not isinstance(x, np.ndarray)]:
        raise UserError(
            f"{path} is no state dict: {len(odd)} of its {len(content)} entries are not tensors "
            f"({', '.join(map(str, odd[:5]))})"
        )
    return content


def read_torch(path: str | os.PathLike) -> Any:
    """What torch.save wrote, tensors as numpy arrays (pytorch/pytorch, `torch/serialization.py`).

    Raises UserError as `read` does.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        with open(path, "rb") as file:
            return _read_legacy(file)
    except (OSError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is no readable torch file: {e!r}") from e
    except (pickle.UnpicklingError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is no readable torch file: {e}") from e


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    # np.ndarray refuses a view that leaves its buffer
    size = storage.dtype.itemsize
    strides = tuple(size * s for s in stride)
    return np.ndarray(tuple(shape), storage.dtype, storage, size * offset, strides)


ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, load_storage: Any):
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which tensors do not need; refused"
            )
        return ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return self._load_storage(dtype, key, count)


def _read_zip(archive: zipfile.ZipFile) -> Any:
    (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        order = archive.read(f"{folder}byteorder")
        if order != b"little":
            raise ValueError(f"byte order {order!r}")
    storages: dict[str, np.ndarray] = {}

    def load(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        if key not in storages:  # tensors may share one
            storages[key] = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)
        return storages[key]

    with archive.open(pickled) as file:
        return _Unpickler(file, load).load()


def _read_legacy(file: BinaryIO) -> Any:
    length = os.fstat(file.fileno()).st_size
    storages: dict[str, np.ndarray] = {}

    def load(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        if count * dtype.itemsize > length:
            raise ValueError(f"storage {key} of {count} values in a file of {length} bytes")
        # filled below: the bytes come after the objects
        return storages.setdefault(key, np.zeros(count, dtype))

    def part() -> Any:
        return _Unpickler(file, load).load()

    if part() != LEGACY_MAGIC:
        raise ValueError("no magic number")
    part(), part()  # protocol, and the machine it was written on
    content = part()
    for key in part():
        count = int.from_bytes(file.read(8), "little")
        storage = storages[key]
        if count != len(storage) or file.readinto(storage.view(np.uint8)) != storage.nbytes:
            raise EOFError(f"storage {key} is cut short")
    return content
