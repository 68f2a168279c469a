"""Batches of the open datasets of a run, laid out on its mesh."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mert_jax import sharding
from mert_jax.constants import HOP_LENGTH
from mert_jax.data import bad_records, pipeline

Batch = dict[str, Any]
BATCH_KEYS = ("audio", "looped", "codes", "record", "faulty")


class Loader:
    """Makes global batches; each host reads the rows of its own devices.

    `sources` has the datasets of the splits "train" and "validation", `weights` the ratio of their
    clips, () for that of their records. A clip has `num_samples`, after `context` samples that only
    teachers hear. Validation batches have `micro_batch_size` rows.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        mesh: Mesh,
        *,
        weights: Sequence[float],
        batch_size: int,
        micro_batch_size: int,
        num_samples: int,
        context: int,
        seed: int,
        max_faulty: float,
        threads: int,
        workers: int,
    ):
        self._sources, self._mesh, self._weights, self._seed = sources, mesh, weights, seed
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._threads, self._workers = threads, workers
        self._clips = dict(num_samples=num_samples, hop=HOP_LENGTH, context=context)
        self._bad_records = [
            bad_records.BadRecords(None, [source], max_faulty) for source in sources["validation"]
        ]

    def _put(self, batch: Mapping[str, Any], batch_size: int) -> Batch:
        def put(rows: Any) -> jax.Array:
            return sharding.global_batch(np.asarray(rows), batch_size, self._mesh)

        return jax.tree.map(put, {key: batch[key] for key in BATCH_KEYS})

    def train(self, start: int) -> Iterator[Batch]:
        """Return batches `start`, `start` + 1, ..., without end."""
        stream = pipeline.train_stream(
            self._sources["train"],
            weights=self._weights,
            batch_size=self._batch_size,
            seed=self._seed,
            start=start,
            rows=sharding.rows_of_host(self._batch_size, self._mesh),
            threads=self._threads,
            workers=self._workers,
            **self._clips,
        )
        return pipeline.prefetch(stream, lambda batch: self._put(batch, self._batch_size))

    def validation(self) -> list[Iterator[Batch]]:
        """Return, for each dataset, batches of one clip of every record."""
        size = self._micro_batch_size
        rows = sharding.rows_of_host(size, self._mesh)

        def batches_of(source: Any, bad: bad_records.BadRecords) -> Iterator[Batch]:
            batches = pipeline.validation_batches(source, batch_size=size, rows=rows, **self._clips)
            counted = bad_records.count_bad_records(batches, bad)
            yield from pipeline.prefetch(counted, lambda batch: self._put(batch, size))

        return list(map(batches_of, self._sources["validation"], self._bad_records))
