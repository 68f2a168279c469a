"""Tensors by name in safetensors files, torch's files and Hugging Face directories."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mert_jax.errors import UserError
from mert_jax.tensors import torch_pickle

State = Mapping[str, np.ndarray]
NAMES = ("model.safetensors", "pytorch_model.bin")  # of a folder's weights, in transformers' order


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return every tensor of a safetensors file or torch state dict; UserError if it is none."""
    if os.fspath(path).endswith(".safetensors"):
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is not a readable safetensors file: {e}") from e
    content = torch_pickle.read_pickle(path)
    check_state_dict(content, path)
    return content


def check_state_dict(content: Any, path: str | os.PathLike) -> None:
    """Raise UserError unless `content` has tensors by name."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    if odd := [str(name) for name, x in content.items() if not isinstance(x, np.ndarray)]:
        count, names = f"{len(odd)} of its {len(content)} entries", ", ".join(odd[:5])
        raise UserError(f"{path} is not a state dict: {count} are not tensors ({names})")


def read_tensor_folder(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return every tensor of a Hugging Face directory. Raises UserError as `read_tensors` does."""
    for name in NAMES:
        if os.path.exists(file := os.path.join(path, name)):
            return read_tensors(file)
    raise UserError(f"{path} has no {' or '.join(NAMES)}; save shards as one (max_shard_size)")


def fingerprint(tree: Any) -> str:
    """Return a hash of the paths, shapes, dtypes and values of a tree of arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def write_tensors(path: str | os.PathLike, state: State, metadata: dict | None = None) -> None:
    """Write tensors as a safetensors file. Raises OSError on a full disk."""
    # safetensors writes a transposed array's memory in its own order, without a warning
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    Path(path).write_bytes(save(state, metadata=metadata or {}))


def read_json(path: str | os.PathLike) -> dict:
    """Return the object in a JSON file. Raises UserError if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not settings by name")
    return content
