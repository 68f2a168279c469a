"""The input stream: crops of prepared datasets, where global batch k depends on (seed, k) only."""

import collections
import fractions
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from mert_jax.data import records
from mert_jax.errors import UserError

X = TypeVar("X")
ENDLESS = 2**48  # clips: endless in practice, where grain's own infinite repeat overflows
MAX_TRIES = 64  # bad records, or bad files of them, passed over in a row


def next_usable(source: Any, index: int) -> tuple[int, dict[str, Any]]:
    """Return the first record from `index` on that can be used, and its index.

    The search wraps around and depends on the dataset alone, so that all hosts and restarts agree.
    Raises UserError after `MAX_TRIES` failures, or if no record can be used.
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
        f"no record of {source!r} from {index} to {(at - 1) % len(source)} can be used; the first "
        f"error: {errors[0]}; copy the dataset again, or remove it and prepare it again"
    ) from errors[0]


class IndexedSource:
    """Adds to each record its index, counted from `first`, and replaces bad records.

    The next usable record replaces a bad one and has the bad one's index as `faulty`, else -1.
    """

    def __init__(self, source: Any, first: int = 0):
        self._source, self._first = source, first

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        at, item = next_usable(self._source, index)
        return {
            "record": self._first + at,
            "faulty": -1 if at == index else self._first + index,
            "audio": item["audio"],
            "codes": item.get("codes", {}),
        }


class RandomCrop(grain.transforms.RandomMap):
    """Cuts `num_samples` from a multiple of `hop`, so that the frames of stored codes line up.

    The `context` samples before come first, zeros before the record's start. A record that is too
    short is looped.
    """

    def __init__(self, num_samples: int, hop: int, context: int):
        self._num_samples, self._hop, self._context = num_samples, hop, context

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        audio = element["audio"]
        last = (len(audio) - self._num_samples) // self._hop
        start = self._hop * int(rng.integers(max(last, 0) + 1))
        looped = len(audio) < self._num_samples
        before = min(start, self._context)
        crop = audio[start - before : start + self._num_samples]
        if looped:
            crop = np.resize(audio, self._num_samples)
        crop = np.pad(crop, (self._context - before, 0))
        # the frame of each hop's first sample
        frames = np.arange(start, start + self._num_samples, self._hop) % len(audio) // self._hop
        return {
            "audio": np.asarray(crop, np.int16),
            "record": np.int32(element["record"]),
            "faulty": np.int32(element["faulty"]),
            "start": np.int32(start),
            "looped": np.bool_(looped),
            "codes": {name: codes[frames] for name, codes in element["codes"].items()},
        }


class MixtureSelection(grain.transforms.DatasetSelectionMap):
    """Maps clip k of a mix to a dataset and the number of earlier clips from that dataset.

    The first k clips hold k * share / sum(shares) of each of D datasets, give or take less than D.
    (grain's `mix` rounds weights to hundredths of the smallest: 1009 : 1000 becomes 1 : 1.)
    """

    def __init__(self, shares: Sequence[int]):
        self._shares = tuple(shares)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        rest = sum(self._shares)  # of this dataset and those after it, which have `index` clips
        for dataset, share in enumerate(self._shares):
            after, with_next = (k * (rest - share) // rest for k in (index, index + 1))
            if after == with_next:
                return dataset, index - after
            index, rest = after, rest - share
        raise AssertionError("the last dataset takes all clips that are left")


class HostRows(grain.transforms.DatasetSelectionMap):
    """Maps element i of a host to the global stream: its `rows` of each batch from `start` on."""

    def __init__(self, rows: Sequence[int], batch_size: int, start: int = 0):
        self._rows, self._batch_size, self._start = tuple(map(int, rows)), batch_size, start

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self._rows))
        return 0, (self._start + batch) * self._batch_size + self._rows[row]


def shares(weights: Sequence[float]) -> list[int]:
    """Return integers in the exact ratio of decimal `weights`: (0.8, 0.2) -> [4, 1]."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(x.denominator for x in exact))
    return [int(x * scale) for x in exact]


def _crops(
    source: Any, num_samples: int, hop: int, context: int, seed: int, shuffle: bool, first: int = 0
) -> grain.MapDataset:
    dataset = grain.MapDataset.source(IndexedSource(source, first)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()  # a new order each epoch, by an index permutation: no memory
    epochs = ENDLESS // len(source) + 1
    # the crop is drawn on the global index, before anything is divided among hosts
    return dataset.repeat(epochs).random_map(RandomCrop(num_samples, hop, context))


def _host_batches(
    clips: grain.MapDataset, rows: Sequence[int] | None, batch_size: int, start: int = 0
) -> grain.MapDataset:
    rows = range(batch_size) if rows is None else rows
    selection = HostRows(rows, batch_size, start)
    return grain.MapDataset.select_from_datasets([clips], selection).batch(len(rows))


def train_stream(
    sources: Sequence[Any],
    *,
    weights: Sequence[float] = (),
    num_samples: int,
    hop: int,
    batch_size: int,
    seed: int,
    context: int = 0,
    start: int = 0,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Return an endless iterator of the `rows` (None: all) of global batches from `start` on.

    A batch has `audio` int16 [B, context + N]; `record` int32 (index in all `sources`, one after
    the other); `faulty` int32 (the bad record that this one replaces, else -1); `start` int32 (of
    the crop, in samples); `looped` bool; `codes` uint16 [B, T, K] by teacher. `weights` is the
    ratio of the sources' clips, () for that of their records. Each source has epochs of its own,
    with every record once, in a new order and with new crops. `threads` read ahead, in `workers`
    processes if that is above 0.
    """
    lengths = [len(source) for source in sources]
    offsets = itertools.accumulate(lengths[:-1], initial=0)
    crops = [  # a seed for each, or datasets of equal length would be shuffled alike
        _crops(source, num_samples, hop, context, seed + i, shuffle=True, first=first)
        for i, (source, first) in enumerate(zip(sources, offsets, strict=True))
    ]
    selection = MixtureSelection(shares(weights or lengths))
    clips = grain.MapDataset.select_from_datasets(crops, selection)
    # up to here nothing depends on the host
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    stream = _host_batches(clips, rows, batch_size, start).to_iter_dataset(read)
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)


def validation_batches(
    source: Any,
    *,
    num_samples: int,
    hop: int,
    batch_size: int,
    context: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the `rows` (None: all) of batches with one fixed crop of every record.

    The last batch is filled up with the first records.
    """
    clips = _crops(source, num_samples, hop, context, seed=0, shuffle=False)
    dataset = _host_batches(clips, rows, batch_size)
    for i in range(-(-len(source) // batch_size)):
        yield dataset[i]


def prefetch(batches: Iterator[Any], put: Callable[[Any], X], depth: int = 2) -> Iterator[X]:
    """Yield `put(batch)` of each batch, called `depth` batches ahead; close `batches` at last."""
    ahead: collections.deque[X] = collections.deque()
    try:
        for batch in batches:
            ahead.append(put(batch))
            if len(ahead) > depth:
                yield ahead.popleft()
        yield from ahead
    finally:
        batches.close()
