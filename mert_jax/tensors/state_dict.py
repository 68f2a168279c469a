"""Tensors by name in safetensors files, torch's files and Hugging Face directories."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mert_jax.errors import UserError
from mert_jax.tensors import torch_pickle

NAMES = ("model.safetensors", "pytorch_model.bin")  # of a folder's weights, in transformers' order


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return every tensor of a safetensors file or of a state dict saved by torch, by name.

    Raises UserError for a file that is missing, cut short or unsafe (see `torch_pickle`), and for
    entries that are not tensors.
    """
    if os.fspath(path).endswith(".safetensors"):
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is no readable safetensors file: {e}") from e
    content = torch_pickle.read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    if odd := [name for name, x in content.items() if not isinstance(x, np.ndarray)]:
        raise UserError(
            f"{path} is no state dict: {len(odd)} of its {len(content)} entries are not tensors "
            f"({', '.join(map(str, odd[:5]))})"
        )
    return content


def read_tensor_folder(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return every tensor of a Hugging Face directory, in one file or in shards.

    Raises UserError as `read_tensors` does.
    """
    for name in NAMES:
        file = os.path.join(path, name)
        if os.path.exists(file):
            return read_tensors(file)
        if os.path.exists(index := f"{file}.index.json"):
            files = read_json(index).get("weight_map")
            shards = list(files.values()) if isinstance(files, dict) else []
            if not shards or not all(isinstance(shard, str) for shard in shards):
                raise UserError(f"{index} does not say which file has which tensor")
            if odd := [shard for shard in shards if os.path.basename(shard) != shard]:
                raise UserError(f"{index} names a file outside of {path}: {odd[0]}")
            tensors = (read_tensors(os.path.join(path, shard)) for shard in sorted(set(shards)))
            return {name: x for state in tensors for name, x in state.items()}
    raise UserError(f"{path} has no {' or '.join(NAMES)}")


def fingerprint(tree: Any) -> str:
    """Return a hash of the paths, shapes, dtypes and values of a tree of arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def write_tensors(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as a safetensors file. Raises OSError on a full disk."""
    # safetensors writes a transposed array's memory in its own order, without a warning
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    try:
        save_file(state, path, metadata=dict(metadata or {}))
    except SafetensorError as e:  # raised on a full disk
        raise OSError(errno.EIO, str(e)) from e
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)  # safetensors lets only the owner read its files


def read_json(path: str | os.PathLike) -> dict:
    """Return the object in a JSON file. Raises UserError if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not settings by name")
    return content
