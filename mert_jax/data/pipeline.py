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
ENDLESS = 2**48  # clips: without end in practice; grain's own for ever overflows
TRIES = 64  # records, or whole files of them, that cannot be used one after the other


def usable(source: Any, index: int) -> tuple[int, dict[str, Any]]:
    """The first record from `index` on that can be used, after the last comes the first, and where
    it is.

    That depends on the dataset alone, so that it is the same on every host and after a restart.
    Raises UserError after `TRIES` faults in a row, and where the whole dataset is faulty.
    """
    at, passed, faults = index, 0, []
    while len(faults) < TRIES and passed < len(source):
        try:
            return at, source[at]
        except records.Fault as fault:
            faults.append(fault)
            passed += fault.beyond - at
            at = fault.beyond % len(source)
    raise UserError(
        f"no record of {source!r} from {index} to {(at - 1) % len(source)} can be used; the first "
        f"fault: {faults[0]}; copy the dataset again, or remove it and prepare it anew"
    ) from faults[0]


class IndexedSource:
    """A random-access source whose records know their own index, counted from `first`; one that
    cannot be used is replaced by the next that can, which says so in `faulty`."""

    def __init__(self, source: Any, first: int = 0):
        self._source, self._first = source, first

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        at, item = usable(self._source, index)
        return {
            "record": self._first + at,
            "faulty": -1 if at == index else self._first + index,
            "audio": item["audio"],
            "codes": item.get("codes", {}),
        }


class RandomCrop(grain.transforms.RandomMap):
    """`num_samples` samples from a start that is a multiple of `hop`, so that frames of stored
    targets line up, and the `context` samples before it, zeros where the record begins; a record
    that is shorter is looped."""

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
        # the frame that holds each hop's first sample
        first = np.arange(start, start + self._num_samples, self._hop) % len(audio) // self._hop
        return {
            "audio": np.asarray(crop, np.int16),
            "record": np.int32(element["record"]),
            "faulty": np.int32(element["faulty"]),
            "start": np.int32(start),
            "looped": np.bool_(looped),
            "codes": {name: codes[first] for name, codes in element["codes"].items()},
        }


class MixtureSelection(grain.transforms.DatasetSelectionMap):
    """Clip k of a mix -> which dataset it comes from, and how many came from there before.

    The first k clips hold k * share / sum(shares) of each of D datasets, give or take less than
    D. (grain's own `mix` cuts weights to hundredths of the least one: 1009 : 1000 becomes 1 : 1.)
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
        raise AssertionError("the last dataset has all that is left")


class HostRows(grain.transforms.DatasetSelectionMap):
    """Element i of one host -> of the global stream: its `rows` of each batch of `batch_size`, from
    batch `start` on."""

    def __init__(self, rows: Sequence[int], batch_size: int, start: int = 0):
        self._rows, self._batch_size, self._start = tuple(map(int, rows)), batch_size, start

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, row = divmod(index, len(self._rows))
        return 0, (self._start + batch) * self._batch_size + self._rows[row]


def shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights` as they are written: (0.8, 0.2) -> [4, 1]."""
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(x.denominator for x in exact))
    return [int(x * scale) for x in exact]


def _crops(
    source: Any, num_samples: int, hop: int, context: int, seed: int, shuffle: bool, first: int = 0
) -> grain.MapDataset:
    dataset = grain.MapDataset.source(IndexedSource(source, first)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()  # another order each epoch, by an index permutation: no memory
    epochs = ENDLESS // len(source) + 1
    # the crop is drawn on the global index, before anything is divided among hosts
    return dataset.repeat(epochs).random_map(RandomCrop(num_samples, hop, context))


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
    """The `rows` (none given: all R = `batch_size`) of global batches `start`, `start` + 1, ...,
    without end.

    A batch has `audio` int16 [R, context + N], `record` int32 (index in all `sources`, one after
    the other), `faulty` int32 (the record that should have come instead, but cannot be used; else
    -1), `start` int32 (of the crop, in samples), `looped` bool and `codes` of the crop, uint16
    [R, T, K] for each teacher that every source has some of. `weights` are in the ratio of the
    sources' clips (none: that of their records). Every record comes once an epoch of its own
    source, in a new order and with a new crop. `threads` read ahead, in as many processes as
    `workers` where that is above 0.
    """
    rows = range(batch_size) if rows is None else rows
    lengths = [len(source) for source in sources]
    crops = [  # another seed for each, or datasets of the same length would be shuffled alike
        _crops(source, num_samples, hop, context, seed + i, shuffle=True, first=first)
        for i, (source, first) in enumerate(
            zip(sources, itertools.accumulate(lengths[:-1], initial=0), strict=True)
        )
    ]
    turns = MixtureSelection(shares(weights or lengths))
    clips = grain.MapDataset.select_from_datasets(crops, turns)
    # what does not depend on the host ends here
    own = grain.MapDataset.select_from_datasets([clips], HostRows(rows, batch_size, start))
    dataset = own.batch(len(rows))
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    stream = dataset.to_iter_dataset(read)
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
    """The `rows` (none given: all) of batches with one crop of every record, the same each time;
    the last batch is filled from the beginning."""
    rows = range(batch_size) if rows is None else rows
    clips = _crops(source, num_samples, hop, context, seed=0, shuffle=False)
    own = grain.MapDataset.select_from_datasets([clips], HostRows(rows, batch_size))
    dataset = own.batch(len(rows))
    for i in range(-(-len(source) // batch_size)):
        yield dataset[i]


def prefetch(batches: Iterator[Any], put: Callable[[Any], X], depth: int = 2) -> Iterator[X]:
    """`put` of each batch, begun `depth` batches ahead, so that the device need not wait; closing
    it closes `batches`."""
    ahead: collections.deque[X] = collections.deque()
    try:
        for batch in batches:
            ahead.append(put(batch))
            if len(ahead) > depth:
                yield ahead.popleft()
        yield from ahead
    finally:
        batches.close()
