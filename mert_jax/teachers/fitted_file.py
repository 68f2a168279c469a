"""The file of a fitted teacher: a safetensors file whose header describes its arrays.

The header has one entry, `mert_jax`: JSON with `teacher` (its name) and `settings` (sizes of the
arrays, the seed, and the dataset's fingerprint).
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.tensors import state_dict

FILE = "teacher.safetensors"
# one entry only: safetensors writes several in an order that differs from run to run
KEY = "mert_jax"


def write_fitted(
    directory: str, name: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> str:
    """Write the teacher `name` into `directory` and return the file's path.

    Equal arrays and settings give equal bytes. Raises UserError if the file cannot be written.
    """
    header = {KEY: json.dumps({"teacher": name, "settings": dict(settings)}, sort_keys=True)}
    arrays = {key: np.asarray(value, np.float32) for key, value in tensors.items()}
    file = os.path.join(directory, FILE)
    with atomic_write(file, replace=True) as path:
        state_dict.write_tensors(path, arrays, header)
    return file


def load(
    path: str | None, name: str, shapes: Callable[[Mapping[str, Any]], Mapping[str, tuple]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the float32 arrays and the settings of the teacher `name` in a file or its directory.

    `shapes` maps settings to the shape of each array. Raises UserError if there is no such file,
    it holds another teacher, or its arrays differ from `shapes`.
    """
    if not path:
        raise UserError(
            f"teacher {name!r} needs checkpoint=PATH; fit one with "
            f"python -m mert_jax.fit_teacher --teacher={name} --data=DIR --output=DIR"
        )
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    header = read_header(file)
    if header["teacher"] != name:
        raise UserError(
            f"{file} holds teacher {header['teacher']!r}, not {name!r}; give a checkpoint of "
            f"{name!r}, or fit it with python -m mert_jax.fit_teacher --teacher={name}"
        )
    tensors = state_dict.read_tensors(file)
    try:
        expected = shapes(header["settings"])
    except KeyError as e:
        raise UserError(f"{file}: its settings lack {e}; fit the teacher again") from e
    wrong = [f"{key} is missing" for key in sorted(set(expected) - set(tensors))]
    wrong += [f"{key} is not expected" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        x, shape = tensors[key], expected[key]
        if x.shape != shape or x.dtype != np.float32:
            wrong.append(f"{key} is {x.dtype} {list(x.shape)}, not float32 {list(shape)}")
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong)}; fit the teacher again")
    return tensors, header["settings"]


def read_header(file: str) -> dict[str, Any]:
    """Return `teacher` and `settings` of a file. Raises UserError if it has no fitted teacher."""
    if not os.path.isfile(file):
        raise UserError(
            f"no fitted teacher in {file}; checkpoint=PATH is the --output of "
            "python -m mert_jax.fit_teacher"
        )
    try:
        with safe_open(file, "np") as opened:
            header = json.loads((opened.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as a fitted teacher: {e}; fit it again") from e
    if not isinstance(header, dict) or not {"teacher", "settings"} <= set(header):
        raise UserError(
            f"{file} is a safetensors file, but not of mert_jax.fit_teacher (its header has no "
            f"{KEY!r}); give the --output of python -m mert_jax.fit_teacher"
        )
    return header
