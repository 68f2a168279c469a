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
Arrays = Mapping[str, np.ndarray]
COMMAND = "python -m mert_jax.fit_teacher"


def write_fitted(directory: str, name: str, tensors: Arrays, settings: Mapping[str, Any]) -> str:
    """Write a teacher to `directory` and return the file's path; equal input, equal bytes."""
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

    Raises UserError without such a file, and if the arrays are not those of `shapes(settings)`.
    """
    fit = f"{COMMAND} --teacher={name}"
    if not path:
        raise UserError(f"{name} needs checkpoint=PATH; fit it with {fit} --data=DIR --output=DIR")
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    header = read_header(file)
    if header["teacher"] != name:
        raise UserError(f"{file} holds teacher {header['teacher']!r}, not {name!r}; fit it: {fit}")
    tensors = state_dict.read_tensors(file)
    try:
        expected = shapes(header["settings"])
    except KeyError as e:
        raise UserError(f"{file}: its settings lack {e}; fit the teacher again") from e
    if wrong := differences(tensors, expected):
        raise UserError(f"{file}: {'; '.join(wrong)}; fit the teacher again")
    return tensors, header["settings"]


def differences(tensors: Arrays, shapes: Mapping[str, tuple]) -> list[str]:
    """Return how `tensors` differ from float32 arrays of these shapes, in words."""
    expected = {key: f"float32 {list(shape)}" for key, shape in shapes.items()}
    actual = {key: f"{x.dtype} {list(x.shape)}" for key, x in tensors.items()}
    return [
        f"{key} is {actual.get(key, 'missing')}, not {expected.get(key, 'expected')}"
        for key in sorted({*actual, *expected})
        if actual.get(key) != expected.get(key)
    ]


def read_header(file: str) -> dict[str, Any]:
    """Return `teacher` and `settings` of a file. Raises UserError if it has no fitted teacher."""
    if not os.path.isfile(file):
        raise UserError(f"no fitted teacher in {file}; give the --output of {COMMAND}")
    try:
        with safe_open(file, "np") as opened:
            header = json.loads((opened.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as a fitted teacher: {e}; fit it again") from e
    if not isinstance(header, dict) or not {"teacher", "settings"} <= set(header):
        problem = f"{file} is a safetensors file, but not of mert_jax.fit_teacher"
        raise UserError(f"{problem} (no {KEY!r} in its header); give the --output of {COMMAND}")
    return header
