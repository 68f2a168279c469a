"""The input stream: crops of prepared datasets, where global batch k depends on (seed, k) only."""

import collections
import dataclasses
import fractions
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from mert_jax.constants import HOP_LENGTH
from mert_jax.data import records
from mert_jax.errors import UserError

Rows = Sequence[int] | None
ENDLESS = 2**48  # clips: endless in practice, where grain's own infinite repeat overflows
MAX_TRIES = 64  # bad records, or bad files of them, passed over in a row


def next_usable(source: Any, index: int) -> tuple[int, dict[str, Any]]:
    """Return the index of the first usable record from `index` on, wrapping around, and the record.

    It depends on the dataset alone, so that all hosts agree. Raises UserError if none is near.
    """
    at, passed, errors = index, 0, []
    while len(errors) < MAX_TRIES and passed < len(source):
        try:
            return at, source[at]
        except records.BadRecordError as error:
            errors.append(error)
            passed += error.next_index - at
            at = error.next_index % len(source)
    raise UserError(
        f"{source.directory}: none of the records {index} to {(at - 1) % len(source)} can be used; "
        f"first error: {errors[0]}; copy the dataset again, or remove it and prepare it again"
    ) from errors[0]


@dataclasses.dataclass(frozen=True)
class RandomClip(grain.transforms.RandomMap):
    """Reads the record of an index and cuts `num_samples` from it, after `context` earlier samples.

    Cuts start at multiples of the hop, as the frames of stored codes do. Zeros come before the
    record's start; a record that is too short is looped. `first` is added to all indices.
    """

    source: Any
    first: int
    num_samples: int
    context: int

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        record, item = next_usable(self.source, index)
        audio, size = item["audio"], self.num_samples
        last = (len(audio) - size) // HOP_LENGTH
        start = HOP_LENGTH * int(rng.integers(max(last, 0) + 1))
        looped = len(audio) < size
        before = min(start, self.context)
        crop = np.resize(audio, size) if looped else audio[start - before : start + size]
        # the frame of each hop's first sample
        frames = np.arange(start, start + size, HOP_LENGTH) % len(audio) // HOP_LENGTH
        return {
            "audio": np.asarray(np.pad(crop, (self.context - before, 0)), np.int16),
            "record": np.int32(self.first + record),
            "faulty": np.int32(-1 if record == index else self.first + index),
            "start": np.int32(start),
            "looped": np.bool_(looped),
            "codes": {name: codes[frames] for name, codes in item["codes"].items()},
        }


def shares(weights: Sequence[float]) -> list[int]:
    """Return integers in the exact ratio of decimal `weights`: (0.8, 0.2) -> [4, 1]."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(x.denominator for x in exact))
    return [int(x * scale) for x in exact]


def clip_of_mix(index: int, shares: Sequence[int]) -> tuple[int, int]:
    """Return the dataset of clip `index` of a mix, and the number of earlier clips from it.

    The first k clips hold k * share / sum(shares) of each of D datasets, give or take less than D.
    (grain's `mix` rounds weights to hundredths of the smallest: 1009 : 1000 becomes 1 : 1.)
    """
    rest = sum(shares)  # of this dataset and those after it, which have `index` clips
    for dataset, share in enumerate(shares):
        after, with_next = (k * (rest - share) // rest for k in (index, index + 1))
        if after == with_next:
            return dataset, index - after
        index, rest = after, rest - share
    raise AssertionError("the last dataset takes all clips")


@dataclasses.dataclass(frozen=True)
class HostClips(grain.transforms.DatasetSelectionMap):
    """Maps clip i of a host, which has `rows` of each batch from `start` on, to the mix."""

    shares: Sequence[int]
    rows: Sequence[int]
    batch_size: int
    start: int = 0

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self.rows))
        clip = (self.start + batch) * self.batch_size + int(self.rows[row])
        return clip_of_mix(clip, self.shares)


def train_stream(
    sources: Sequence[Any],
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
    context: int = 0,
    start: int = 0,
    rows: Rows = None,
    threads: int = 4,
    workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Return an endless iterator of the `rows` (None: all) of global batches from `start` on.

    A batch has `audio` int16 [B, context + N]; `record` int32 (index in all `sources`, one after
    the other); `faulty` int32 (the bad record that this one replaces, else -1); `start` int32 (of
    the crop, in samples); `looped` bool; `codes` uint16 [B, T, K] by teacher. `weights` is the
    ratio of the sources' clips, () for that of their records. Each source has epochs of its own.
    """
    rows, clips, first = range(batch_size) if rows is None else rows, [], 0
    for i, source in enumerate(sources):
        # a seed for each, or datasets of equal length would be shuffled alike
        indices = grain.MapDataset.range(len(source)).seed(seed + i)
        # a new order each epoch, by an index permutation: no memory
        indices = indices.shuffle().repeat(ENDLESS // len(source) + 1)
        # drawn on the global index, before anything is divided among hosts
        clips.append(indices.random_map(RandomClip(source, first, num_samples, context)))
        first += len(source)
    selection = HostClips(shares(weights or list(map(len, sources))), rows, batch_size, start)
    batches = grain.MapDataset.select_from_datasets(clips, selection).batch(len(rows))
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    stream = batches.to_iter_dataset(read)
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)


def validation_batches(
    source: Any, *, num_samples: int, batch_size: int, context: int = 0, rows: Rows = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of one fixed crop of every record, filled up with the first records."""
    rows = range(batch_size) if rows is None else rows
    indices = grain.MapDataset.range(len(source)).seed(0).repeat(ENDLESS // len(source) + 1)
    clips = indices.random_map(RandomClip(source, 0, num_samples, context))
    selection = HostClips([1], rows, batch_size)
    batches = grain.MapDataset.select_from_datasets([clips], selection).batch(len(rows))
    yield from map(batches.__getitem__, range(-(-len(source) // batch_size)))


def prefetch(batches: Iterator[Any], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Any]:
    """Yield `put(batch)` of each batch, called `depth` batches ahead; close `batches` at last."""
    ahead = collections.deque()
    try:
        for batch in batches:
            ahead.append(put(batch))
            if len(ahead) > depth:
                yield ahead.popleft()
        yield from ahead
    finally:
        batches.close()
