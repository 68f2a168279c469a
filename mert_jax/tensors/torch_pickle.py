"""Files of torch.save, read and written without torch (pytorch/pytorch, `torch/serialization.py`).

Such a file is a pickle, which may call any function that it names. Here it may name tensors, their
storage, plain containers, and classes of the packages in `STUBS`: their objects become `Stub`s,
which keep the attributes and run no code. Everything else is refused.
"""

import collections
import mmap
import os
import pickle
import struct
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mert_jax.errors import UserError

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
STORAGE_OF = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # files from before torch 1.6
# packages of the objects in fairseq's checkpoints: settings, dictionaries, and their types
STUBS = ("argparse", "fairseq", "mert_fairseq", "omegaconf", "typing")


def read_pickle(path: str | os.PathLike) -> Any:
    """Return the content of a file of torch.save, with tensors as numpy arrays.

    Raises UserError for a file that is missing, cut short or something else, and for names that are
    neither in `ADMITTED` nor of `STUBS`.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _read_legacy(view)
    except Exception as e:  # garbled bytes make pickle, zipfile and numpy raise nearly anything
        clear = isinstance(e, pickle.UnpicklingError | zipfile.BadZipFile)
        raise UserError(f"{path} is no readable torch file: {e if clear else repr(e)}") from e


class Stub:
    """Stands for an object of an absent class: the arguments of its call, and its attributes."""

    args: tuple = ()

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    size = storage.dtype.itemsize
    strides = tuple(size * s for s in stride)
    # raises ValueError for a view that leaves its buffer
    return np.ndarray(tuple(shape), storage.dtype, storage, size * offset, strides)


def _bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # pickles of protocol 2 encode bytes so
        raise ValueError(f"bytes in {encoding!r}")
    return text.encode("latin1")


class _Dtype(Stub):
    """numpy's dtype object: its name in `args`, its byte order in `state`."""


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, np.dtype(str(dtype.args[0])), 1)[0]


def _type_of(x: Any) -> type:
    if x is not None:  # the type of a type makes classes, that of a function makes functions
        raise pickle.UnpicklingError("it asks for the type of a value; refused")
    return type(None)


def _item_of_type(kind: Any, item: Any) -> type[Stub]:
    if not (isinstance(kind, type) and issubclass(kind, Stub)):
        raise pickle.UnpicklingError("it asks for operator.getitem of a value; refused")
    return kind  # List[str], Optional[int]


ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): np.dtype(dtype) for name, dtype in STORAGES.items()},
    # numbers of numpy, in a trainer's state
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    # types of settings
    ("collections", "defaultdict"): lambda *_: {},
    ("_operator", "getitem"): _item_of_type,
    ("__builtin__", "type"): _type_of,
    ("__builtin__", "unicode"): str,  # protocol 2 has the names of Python 2
    ("__builtin__", "long"): int,
    **{("__builtin__", kind.__name__): kind for kind in (bool, dict, float, int, list, set, str)},
}


class _Unpickler(pickle._Unpickler):  # in Python, since the one in C cannot refuse an opcode
    def __init__(self, file: BinaryIO, load_storage: Any):
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        module = "__builtin__" if module == "builtins" else module
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module.split(".")[0] in STUBS:
            return type(name, (Stub,), {})
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which tensors do not need; refused"
        )

    def load_build(self) -> None:
        """Set the state of a stub or OrderedDict only.

        A function's state has its defaults, and an array's replaces the memory that views share.
        """
        if not isinstance(self.stack[-2], Stub | collections.OrderedDict):
            kind = type(self.stack[-2]).__name__
            raise pickle.UnpicklingError(f"it asks to set the state of a {kind}; refused")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates any length that the file states

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


def _read_legacy(file: mmap.mmap) -> Any:
    # reading from a map allocates no more than its size; a file, any length that is stated
    storages: dict[str, np.ndarray] = {}

    def load(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        if count * dtype.itemsize > len(file):
            raise ValueError(f"storage {key} of {count} values in a file of {len(file)} bytes")
        # filled below, since the bytes come after the objects
        return storages.setdefault(key, np.zeros(count, dtype))

    def part() -> Any:
        return _Unpickler(file, load).load()

    if part() != LEGACY_MAGIC:
        raise ValueError("no magic number")
    part(), part()  # protocol version, and a description of the machine
    content = part()
    for key in part():
        count = int.from_bytes(file.read(8), "little")
        storage = storages[key]
        stored = file.read(storage.nbytes)
        if count != len(storage) or len(stored) != storage.nbytes:
            raise EOFError(f"storage {key} is cut short")
        storage.view(np.uint8)[:] = np.frombuffer(stored, np.uint8)
    return content


def write_pickle(path: str | os.PathLike, content: Any) -> None:
    """Write a file for torch.load, with numpy arrays as tensors.

    Content may be dicts, lists, tuples, numbers, text, None and arrays; equal content gives equal
    bytes. Raises TypeError for anything else, OSError on a full disk.
    """
    arrays: list[np.ndarray] = []
    with zipfile.ZipFile(path, "w") as archive:

        def store(name: str, data: Any) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")  # with a fixed date
            with archive.open(entry, "w", force_zip64=True) as file:
                file.write(data)

        store("data.pkl", b"\x80\x02" + _pickled(content, arrays) + b".")
        store("byteorder", b"little")
        for key, x in enumerate(arrays):
            store(f"data/{key}", np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        store("version", b"3\n")


def _pickled(x: Any, arrays: list[np.ndarray]) -> bytes:
    """Return opcodes of pickle's protocol 2 that push `x`, and append its tensors to `arrays`.

    Python's own pickler would have to import torch to name its functions.
    """

    def inner(*values: Any) -> bytes:
        return b"".join(_pickled(value, arrays) for value in values)

    match x:
        case None:
            return b"N"
        case bool():
            return b"\x88" if x else b"\x89"
        case int():
            return b"\x8a\x09" + x.to_bytes(9, "little", signed=True)  # LONG1
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case dict():
            return b"}(" + b"".join(inner(*item) for item in x.items()) + b"u"
        case list():
            return b"](" + inner(*x) + b"e"
        case tuple():
            return b"(" + inner(*x) + b"t"
        case np.ndarray() if x.dtype in STORAGE_OF:
            arrays.append(x)
            storage = b"ctorch\n" + STORAGE_OF[x.dtype].encode() + b"\n"
            reference = inner("storage") + storage + inner(str(len(arrays) - 1), "cpu", x.size)
            steps = tuple(int(np.prod(x.shape[i + 1 :])) for i in range(x.ndim))
            arguments = b"(" + reference + b"tQ" + inner(0, x.shape, steps, False)
            hooks = b"ccollections\nOrderedDict\n)R"
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + hooks + b"tR"
    raise TypeError(f"{type(x).__name__} has no place in a torch file")
