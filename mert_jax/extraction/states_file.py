"""A recording's hidden states on their way to an .npz, written as its pieces come, in any order."""

import os
import zipfile
from typing import Any

import numpy as np

from mert_jax.data.decoding import SkippedFile
from mert_jax.extraction.chunking import Segment


class StatesFile:
    """Hidden states [layers, frames, D], or their mean [layers, D], in a file at `path` while they
    come; no more than a piece of them is in memory. OSError where the disk does not take them."""

    def __init__(self, path: str, frames: int, pool: str, dtype: np.dtype):
        self._path, self._mean, self._dtype = path, pool == "mean", dtype
        self.frames, self.missing = frames, frames
        self._file, self._start, self._sum = None, 0, 0.0

    def add(self, row: Segment, states: np.ndarray) -> None:
        """Take what `Embedder.run` gave for a piece; LeftOut for values that `dtype` has not."""
        kept = row.last - row.first
        self.missing -= kept
        if self._mean:
            self._sum = self._sum + states.astype(np.float64)
            if not self.missing:
                self._open((len(states), states.shape[-1]))
                self._file.write(self._cast(self._sum / self.frames).tobytes())
            return
        layers, width = len(states), states.shape[-1]
        if self._file is None:
            self._open((layers, self.frames, width))
        states = self._cast(states)
        for layer in range(layers):
            place = (layer * self.frames + row.at) * width * self._dtype.itemsize
            self._file.seek(self._start + place)
            self._file.write(states[layer].tobytes())

    def _open(self, shape: tuple[int, ...]) -> None:
        self._file = open(self._path, "wb")  # noqa: SIM115 (closed by finish and discard)
        description = dict(descr=self._dtype.str, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(self._file, description)
        self._start = self._file.tell()

    def _cast(self, states: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = states.astype(self._dtype)
        if not np.isfinite(cast).all():
            largest = np.abs(states).max()
            raise SkippedFile("overflow", f"a value of {largest:.4g} is none of {self._dtype.name}")
        return cast

    def finish(self, path: str, **arrays: Any) -> None:
        """Make the .npz at `path` of the hidden states and other `arrays`."""
        self._file.close()
        packed = f"{self._path}.npz"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            archive.write(self._path, "hidden_states.npy")
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array))
        os.unlink(self._path)
        os.replace(packed, path)

    def discard(self) -> None:
        """Leave nothing."""
        if self._file:
            self._file.close()
            os.unlink(self._path)
