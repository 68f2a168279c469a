"""Frames of a prepared dataset, drawn in an order that depends on the seed only.

Shapes: B clips, N samples, T frames, n frames in all, F feature bins.
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
# of a clip: its frames are much alike, more clips tell more
FRAMES_OF_CLIP = 64
ENOUGH = 10  # frames a centre


class Sampler:
    """Random frames of a dataset's clips: crops such as training draws, at most `frames` of them
    (a quarter of that for validation), so that memory is bounded whatever the dataset's size."""

    def __init__(self, directory: str, seed: int, frames: int):
        self._directory, self._seed, self._frames = directory, seed, frames
        self.metadata = records.metadata(directory)
        hop = self.metadata["hop_length"]
        self._num_samples = self.metadata["overlap_samples"] // hop * hop

    @property
    def has_validation(self) -> bool:
        """Whether the dataset holds tracks back."""
        return bool(self.metadata["splits"].get("validation", {}).get("records"))

    def available(self, split: str) -> int:
        """How many frames `draw` gives."""
        seconds = self.metadata["splits"].get(split, {}).get("hours", 0) * 3600
        held = int(seconds * self.metadata["sample_rate"] / self.metadata["hop_length"])
        return min(held, self._frames if split == "train" else self._frames // 4)

    def check(self, centres: int) -> None:
        """Raise UserError for fewer frames than centres, and note when they are few for them."""
        frames, enough = self.available("train"), ENOUGH * centres
        need = f"{enough} ({enough / 75 / 60:.1f} minutes of music, --frames={enough})"
        if frames < centres:
            raise UserError(
                f"{frames} frames of {self._directory} cannot make a codebook of {centres}; it "
                f"needs {need}: prepare more music or raise --frames"
            )
        if frames < enough:
            progress.note(
                f"warning: {frames} frames are few for a codebook of {centres}, which may not hold "
                f"for other music; {need} are enough"
            )

    def draw(self, split: str, features: Callable[[jax.Array], Any]) -> Any:
        """Frames f32 [n, F] of the train or validation split, for each array [B, T, F] of what
        `features` makes of waves [B, N]."""
        total = self.available(split)
        source = records.open_source(self._directory, split)
        stream = pipeline.train_stream(
            [source],
            num_samples=self._num_samples,
            hop=self.metadata["hop_length"],
            batch_size=CLIPS,
            seed=self._seed,
        )
        stream = bad_records.count_bad_records(stream, bad_records.BadRecords(None, [source]))
        rng = np.random.default_rng([self._seed, split == "train"])
        made, drawn, held = jax.jit(features), 0, None
        with progress.bar(f"reading {split}", total, "frame") as bar:
            while drawn < total:
                wave = next(stream)["audio"].astype(np.float32) / FULL_SCALE
                leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, made(wave)))
                clips, frames = leaves[0].shape[:2]
                held = held or [np.empty((total, x.shape[-1]), np.float32) for x in leaves]
                count = min(frames, FRAMES_OF_CLIP)
                picked = rng.random((clips, frames)).argsort(1)[:, :count]
                stop = min(total, drawn + clips * count)
                for array, x in zip(held, leaves, strict=True):
                    chosen = np.take_along_axis(x, picked[..., None], 1).reshape(-1, x.shape[-1])
                    array[drawn:stop] = chosen[: stop - drawn]
                bar.update(stop - drawn)
                drawn = stop
        return jax.tree.unflatten(tree, held)
