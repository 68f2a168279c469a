"""The file of a fitted teacher: arrays, and in its header what they were made of.

A safetensors file whose header has one entry, `mert_jax`: JSON with `teacher` (name) and `settings`
(sizes the arrays follow from, and the seed and the dataset's fingerprint).
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from mert_jax.errors import UserError

FILE = "teacher.safetensors"
# one entry only: safetensors writes several in an order that differs from run to run
KEY = "mert_jax"


def write_fitted(
    directory: str, name: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> str:
    """Write the teacher `name` into `directory`, whole or not at all, and return the file's path.

    Equal arrays and settings give equal bytes.
    """
    header = {KEY: json.dumps({"teacher": name, "settings": dict(settings)}, sort_keys=True)}
    # what is not contiguous would be written in the order of its memory
    arrays = {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()}
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, FILE)
    write(path, serialise(arrays, header))
    return path


def write(path: str, content: bytes) -> None:
    """Write a file, whole or not at all."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(
    path: str | None, name: str, shapes: Callable[[Mapping[str, Any]], Mapping[str, tuple]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays f32 and settings of the teacher `name` in `path`, the file or its directory.

    `shapes` maps settings to the shape of every array. Raises UserError where there is no such
    file, it holds another teacher, or its arrays are not those.
    """
    if not path:
        raise UserError(
            f"teacher {name!r} needs checkpoint=PATH; fit one with "
            f"python -m mert_jax.fit_teacher --teacher={name} --data=DIR --output=DIR"
        )
    file = os.path.join(path, FILE) if os.path.isdir(path) else path
    found = describe(file)
    if found["teacher"] != name:
        raise UserError(
            f"{file} holds teacher {found['teacher']!r}, not {name!r}; give the checkpoint of one, "
            f"or fit it with python -m mert_jax.fit_teacher --teacher={name}"
        )
    with safe_open(file, "np") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    try:
        expected = shapes(found["settings"])
    except KeyError as e:
        raise UserError(f"{file}: its settings lack {e}; fit the teacher again") from e
    wrong = [f"{key} is missing" for key in sorted(set(expected) - set(tensors))]
    wrong += [f"{key} is not expected" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        have, need = tensors[key], tuple(expected[key])
        if have.shape != need or have.dtype != np.float32:
            wrong.append(f"{key} is {have.dtype} {list(have.shape)}, not float32 {list(need)}")
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong)}; fit the teacher again")
    return tensors, found["settings"]


def describe(file: str) -> dict[str, Any]:
    """`teacher` and `settings` of a fitted teacher's file; UserError where it is none."""
    if not os.path.isfile(file):
        raise UserError(
            f"no fitted teacher in {file}; checkpoint=PATH is the --output of "
            "python -m mert_jax.fit_teacher"
        )
    try:
        with safe_open(file, "np") as opened:
            found = json.loads((opened.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as a fitted teacher: {e}; fit it again") from e
    if not isinstance(found, dict) or not {"teacher", "settings"} <= set(found):
        raise UserError(
            f"{file} is a safetensors file, but not of mert_jax.fit_teacher (its header has no "
            f"{KEY!r}); give the --output of python -m mert_jax.fit_teacher"
        )
    return found
