"""Tensors by name, from the files that others keep them in."""

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

# what transformers calls a folder's weights, in its order of preference
NAMES = ("model.safetensors", "pytorch_model.bin")


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file or of a state dict that torch saved, by name.

    Raises UserError for a file that is missing, cut short, something else, or that names a function
    which is none of torch's own for tensors.
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
    """Every tensor of a Hugging Face directory, whole or in shards; errors as in `read`."""
    for name in NAMES:
        file = os.path.join(path, name)
        if os.path.exists(file):
            return read_tensors(file)
        if os.path.exists(f"{file}.index.json"):
            files = read_json(f"{file}.index.json").get("weight_map")
            named = list(files.values()) if isinstance(files, dict) else []
            if not named or not all(isinstance(shard, str) for shard in named):
                raise UserError(f"{file}.index.json does not say which file has which tensor")
            shards = sorted(set(named))
            if odd := [shard for shard in shards if os.path.basename(shard) != shard]:
                raise UserError(f"{file}.index.json names a file outside of {path}: {odd[0]}")
            state: dict[str, np.ndarray] = {}
            for shard in shards:
                state |= read_tensors(os.path.join(path, shard))
            return state
    raise UserError(f"{path} has no {' or '.join(NAMES)}")


def fingerprint(tree: Any) -> str:
    """Name a tree of arrays by what is in it: equal names, equal trees."""
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
    """Write tensors as a safetensors file. Raises OSError where the disk does not take them."""
    # safetensors writes the memory of a transposed array as it lies, without a word
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    try:
        save_file(state, path, metadata=dict(metadata or {}))
    except SafetensorError as e:  # its word for a full disk
        raise OSError(errno.EIO, str(e)) from e
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)  # it makes files that nobody else may read


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not settings by name")
    return content
