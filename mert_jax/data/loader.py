"""Batches of the open datasets of a run, laid out on its mesh."""

import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes global batches; each host reads the rows of its own devices.

    `sources` has the datasets of the splits "train" and "validation", `weights` the ratio of their
    clips, () for that of their records. A clip has `num_samples`, after `context` samples that only
    teachers hear. Validation batches have `micro_batch_size` rows.
    """

    sources: Mapping[str, Sequence[Any]]
    mesh: Mesh
    _: dataclasses.KW_ONLY
    weights: Sequence[float]
    batch_size: int
    micro_batch_size: int
    num_samples: int
    context: int
    seed: int
    max_faulty: float
    threads: int
    workers: int

    @functools.cached_property
    def _bad_records(self) -> list[bad_records.BadRecords]:
        validation = self.sources["validation"]
        return [bad_records.BadRecords(None, [source], self.max_faulty) for source in validation]

    @property
    def _clips(self) -> dict[str, int]:
        return dict(num_samples=self.num_samples, hop=HOP_LENGTH, context=self.context)

    def _put(self, batch: Mapping[str, Any], batch_size: int) -> Batch:
        def put(rows: Any) -> jax.Array:
            return sharding.global_batch(np.asarray(rows), batch_size, self.mesh)

        return jax.tree.map(put, {key: batch[key] for key in BATCH_KEYS})

    def train(self, start: int) -> Iterator[Batch]:
        """Return batches `start`, `start` + 1, ..., without end."""
        stream = pipeline.train_stream(
            self.sources["train"],
            weights=self.weights,
            batch_size=self.batch_size,
            seed=self.seed,
            start=start,
            rows=sharding.rows_of_host(self.batch_size, self.mesh),
            threads=self.threads,
            workers=self.workers,
            **self._clips,
        )
        return pipeline.prefetch(stream, lambda batch: self._put(batch, self.batch_size))

    def validation(self) -> list[Iterator[Batch]]:
        """Return, for each dataset, batches of one clip of every record."""
        size = self.micro_batch_size
        rows = sharding.rows_of_host(size, self.mesh)

        def batches_of(source: Any, bad: bad_records.BadRecords) -> Iterator[Batch]:
            batches = pipeline.validation_batches(source, batch_size=size, rows=rows, **self._clips)
            counted = bad_records.count_bad_records(batches, bad)
            yield from pipeline.prefetch(counted, lambda batch: self._put(batch, size))

        return list(map(batches_of, self.sources["validation"], self._bad_records))
