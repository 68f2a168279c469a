"""Files of torch.save, read and written without torch (pytorch/pytorch, `torch/serialization.py`).

Such a file is a pickle, which may call any function that it names. Here it may name tensors, their
storage, plain containers, and classes of the packages in `STUBS`: their objects become `Stub`s,
which keep the attributes and run no code. Everything else is refused.
"""

import collections
import functools
import os
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes  # noqa: F401 (gives numpy bfloat16)
import numpy as np

from mert_jax.errors import UserError

NAMES = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()
KINDS = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
STORAGES = {f"{name}Storage": np.dtype(kind) for name, kind in zip(NAMES, KINDS, strict=True)}
STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
# packages of the objects in fairseq's checkpoints: settings, dictionaries, and their types
STUBS = ("argparse", "fairseq", "mert_fairseq", "omegaconf", "typing")


def read_pickle(path: str | os.PathLike) -> Any:
    """Return the content of a file of torch.save, tensors as numpy arrays; UserError if refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except Exception as e:  # garbled bytes make pickle, zipfile and numpy raise nearly anything
        clear = isinstance(e, pickle.UnpicklingError | zipfile.BadZipFile)
        old = "; save one from before torch 1.6 again" if type(e) is zipfile.BadZipFile else ""
        reason = f"{e if clear else repr(e)}{old}"
        raise UserError(f"{path} is not a readable torch file: {reason}") from e


class Stub:
    """Stands for an object of an absent class: the arguments of its call, and its attributes."""

    args: tuple = ()

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    dtype, size = storage.dtype, storage.dtype.itemsize
    # raises ValueError for a view that leaves its buffer
    return np.ndarray(tuple(shape), dtype, storage, size * offset, tuple(size * s for s in stride))


def _scalar(dtype: Stub, content: bytes) -> Any:
    return np.frombuffer(content, str(dtype.args[0]), 1)[0]


ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    # numbers of numpy, in a trainer's state; pickles of protocol 2 encode bytes as latin1
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    ("numpy", "dtype"): Stub,  # its name in `args`
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    # types of settings, such as List[str], none of which is made
    ("collections", "defaultdict"): lambda *_: {},
    ("_operator", "getitem"): Stub,
    ("__builtin__", "type"): Stub,
    ("__builtin__", "unicode"): str,  # protocol 2 has the names of Python 2
    ("__builtin__", "long"): int,
    **{("__builtin__", kind.__name__): kind for kind in (bool, dict, float, int, list, set, str)},
}


class _Unpickler(pickle._Unpickler):  # in Python, since the one in C cannot refuse an opcode
    def find_class(self, module: str, name: str) -> Any:
        module = "__builtin__" if module == "builtins" else module
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module.split(".")[0] in STUBS:
            return type(name, (Stub,), {})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; refused")

    def load_build(self) -> None:
        # a function's state has its defaults, and an array's replaces the memory that views share
        if not isinstance(target := self.stack[-2], Stub | collections.OrderedDict):
            kind = type(target).__name__
            raise pickle.UnpicklingError(f"it asks to set the state of a {kind}; refused")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates any length that the file states


def _read(archive: zipfile.ZipFile) -> Any:
    (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder, order = pickled.removesuffix("data.pkl"), b"little"
    if f"{folder}byteorder" in archive.namelist():
        order = archive.read(f"{folder}byteorder")
    if order != b"little":
        raise ValueError(f"byte order {order!r}")

    @functools.cache  # tensors may share a storage
    def load(reference: tuple) -> np.ndarray:
        kind, dtype, key, _, count = reference[:5]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

    with archive.open(pickled) as file:
        unpickler = _Unpickler(file, encoding="utf-8")
        unpickler.persistent_load = load
        return unpickler.load()


def write_pickle(path: str | os.PathLike, content: Any) -> None:
    """Write dicts, lists, tuples, numbers, text, None and numpy arrays for torch.load.

    Equal content gives equal bytes. Raises TypeError for anything else, OSError on a full disk.
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
    """Return opcodes of protocol 2 that push `x`, and append its tensors to `arrays`.

    Python's own pickler would have to import torch to name its functions.
    """

    def inner(*values: Any) -> bytes:
        return b"".join(_pickled(value, arrays) for value in values)

    match x:
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        case int():
            return b"\x8a\x09" + x.to_bytes(9, "little", signed=True)  # LONG1
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case dict():
            return b"}(" + b"".join(inner(*item) for item in x.items()) + b"u"
        case list() | tuple():
            start, end = (b"](", b"e") if isinstance(x, list) else (b"(", b"t")
            return start + inner(*x) + end
        case np.ndarray() if x.dtype in STORAGE_OF:
            arrays.append(x)
            storage = b"ctorch\n" + STORAGE_OF[x.dtype].encode() + b"\n"
            reference = inner("storage") + storage + inner(str(len(arrays) - 1), "cpu", x.size)
            steps = tuple(int(np.prod(x.shape[i + 1 :])) for i in range(x.ndim))
            arguments = b"(" + reference + b"tQ" + inner(0, x.shape, steps, False)
            hooks = b"ccollections\nOrderedDict\n)R"
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + hooks + b"tR"
    raise TypeError(f"{type(x).__name__} has no place in a torch file")
