"""Reading the golden numbers of the official code, and comparing with them."""

import functools
import json
import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = Path(os.environ.get("MERT_JAX_GOLDEN") or Path(__file__).parent / "golden").resolve()
X64 = jax.config.jax_enable_x64
DTYPE = jnp.float64 if X64 else jnp.float32
SPECIALS = 4  # fairseq's dictionary: code c is class c + 4


@functools.cache
def npz(name: str) -> dict[str, np.ndarray]:
    path = FOLDER / name
    if not path.exists():
        return {}
    with np.load(path) as file:
        return dict(file)


@functools.cache
def read_json(name: str) -> dict:
    path = FOLDER / name
    return json.loads(path.read_text()) if path.exists() else {}


def names(pattern: str) -> list[str]:
    return sorted(path.name for path in FOLDER.glob(pattern))


def keys(name: str, but: str = "$^") -> list[str]:
    return [key for key in npz(name) if not re.fullmatch(but, key)]


def every_frame_stored(ours: np.ndarray, stored: np.ndarray, axis: int) -> np.ndarray:
    """The frames that a decimated array holds: 0, s, 2s, ... with s from the two shapes."""
    stride = math.ceil(ours.shape[axis] / max(stored.shape[axis], 1))
    ours = np.take(ours, np.arange(0, ours.shape[axis], stride), axis)
    assert ours.shape == stored.shape
    return ours


def check(record, error: float, tolerance: float, what: str = "error") -> None:
    record("error_over_tolerance", float(error / tolerance) if tolerance else float(error))
    assert error <= tolerance, f"{what} {error:.3g} is above {tolerance:.3g}"


def max_error(ours, stored) -> float:
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    assert ours.shape == stored.shape
    return float(np.abs(ours - stored).max(initial=0))


def relative_error(ours, stored) -> float:
    """The largest error of single values, each relative to its own size."""
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    assert ours.shape == stored.shape
    error = np.abs(ours - stored)
    return float((error / np.where(stored == 0, 1, np.abs(stored))).max(initial=0))


def relative_l2(ours, stored) -> float:
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    assert ours.shape == stored.shape
    return float(np.linalg.norm(ours - stored) / max(np.linalg.norm(stored), 1e-300))


def five_seconds() -> np.ndarray:
    return npz("audio_5s.npz")["audio_i16"][None]


def fake_state(tensors: list) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape, *_ in tensors}
