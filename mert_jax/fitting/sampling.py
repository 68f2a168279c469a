"""Frames of a prepared dataset, drawn in an order that depends on the seed only.

Shapes: B clips, N samples, T frames a clip, n frames in all, F feature bins.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mert_jax import progress
from mert_jax.constants import FULL_SCALE
from mert_jax.data import bad_records, pipeline, records
from mert_jax.errors import UserError

CLIPS = 8  # read and transformed at a time
FRAMES_PER_CLIP = 64  # a clip's frames are much alike: more clips are better than more frames
ENOUGH = 10  # frames for each centre


class Sampler:
    """Draws at most `frames` frames (a quarter for validation) of the crops of training."""

    def __init__(self, directory: str, seed: int, frames: int):
        self._directory, self.seed, self._frames = directory, seed, frames
        self.metadata = records.metadata(directory)

    @property
    def has_validation(self) -> bool:
        return bool(self.metadata["splits"].get("validation", {}).get("records"))

    def available(self, split: str) -> int:
        """Return the number of frames that `draw` returns."""
        seconds = self.metadata["splits"].get(split, {}).get("hours", 0) * 3600
        stored = int(seconds * self.metadata["sample_rate"] / self.metadata["hop_length"])
        return min(stored, self._frames if split == "train" else self._frames // 4)

    def check(self, centres: int) -> None:
        """Raise UserError for fewer frames than centres, and warn if there are few for them."""
        frames, enough = self.available("train"), ENOUGH * centres
        need = f"{enough} ({enough / 75 / 60:.1f} minutes of music, --frames={enough})"
        if frames < centres:
            few = f"{frames} frames of {self._directory} cannot make a codebook of {centres}"
            raise UserError(f"{few}; it needs {need}: prepare more music or raise --frames")
        if frames < enough:
            few = f"warning: {frames} frames are few for a codebook of {centres}"
            progress.note(f"{few}, which may not fit other music; {need} are enough")

    def draw(self, split: str, features: Callable[[jax.Array], Any]) -> Any:
        """Return frames f32 [n, F] of a split, for each array [B, T, F] of `features` of waves."""
        source = records.open_source(self._directory, split)
        sizes = dict(num_samples=self.metadata["overlap_samples"], batch_size=CLIPS)
        stream = pipeline.train_stream([source], **sizes, seed=self.seed)
        stream = bad_records.count_bad_records(stream, bad_records.BadRecords(None, [source]))
        rng = np.random.default_rng([self.seed, split == "train"])
        total, drawn, parts, compute = self.available(split), 0, [], jax.jit(features)
        with progress.bar(f"reading {split}", total, "frame") as bar:
            while drawn < total:
                wave = next(stream)["audio"].astype(np.float32) / FULL_SCALE
                arrays, tree = jax.tree.flatten(jax.tree.map(np.asarray, compute(wave)))
                index = rng.random(arrays[0].shape[:2]).argsort(1)[:, :FRAMES_PER_CLIP, None]
                picked = [np.take_along_axis(x, index, 1) for x in arrays]
                parts.append([x.reshape(-1, x.shape[-1])[: total - drawn] for x in picked])
                bar.update(len(parts[-1][0]))
                drawn += len(parts[-1][0])
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return jax.tree.unflatten(tree, columns)
