"""The hidden states of a recording on their way to an .npz, written in any order of segments."""

import os
import zipfile
from typing import Any

import numpy as np

from mert_jax.data.decoding import SkippedFile
from mert_jax.extraction.chunking import Segment


class StatesFile:
    """Collects hidden states [layers, frames, D] in a file at `path`, or their mean in memory.

    No more than a segment of the hidden states is in memory. Raises OSError for a full disk.
    """

    def __init__(self, path: str, frames: int, pool: str, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self.frames, self.missing = frames, frames
        self._sum = 0.0 if pool == "mean" else None
        self._file, self._start = None, 0

    def add(self, segment: Segment, states: np.ndarray) -> None:
        """Add the output of `Embedder.run`. Raises SkippedFile for values too large for `dtype`."""
        self.missing -= segment.last - segment.first
        if self._sum is not None:
            self._sum = self._sum + states.astype(np.float64)
            return
        states = self._cast(states)
        layers, _, width = states.shape
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by finish and discard)
            shape = (layers, self.frames, width)
            header = dict(descr=self._dtype.str, fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(self._file, header)
            self._start = self._file.tell()
        for layer in range(layers):
            offset = (layer * self.frames + segment.at) * width * self._dtype.itemsize
            self._file.seek(self._start + offset)
            self._file.write(states[layer].tobytes())

    def _cast(self, states: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = states.astype(self._dtype)
        if not np.isfinite(cast).all():
            largest = np.abs(states).max()
            raise SkippedFile("overflow", f"{largest:.4g} does not fit into {self._dtype.name}")
        return cast

    def finish(self, path: str, **arrays: Any) -> None:
        """Write the .npz at `path`, of the hidden states and other `arrays`."""
        if self._sum is not None:
            arrays = {"hidden_states": self._cast(self._sum / self.frames), **arrays}
        packed = f"{self._path}.npz"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            if self._file:
                self._file.close()
                archive.write(self._path, "hidden_states.npy")
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array))
        self.discard()
        os.replace(packed, path)

    def discard(self) -> None:
        """Remove the temporary file."""
        if self._file:
            self._file.close()
            os.unlink(self._path)
