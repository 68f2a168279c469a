"""Batches of a config's datasets, laid out on a mesh."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.constants import HOP_LENGTH
from mert_jax.data import bad_records, pipeline

Batch = dict[str, Any]
USED = ("audio", "looped", "codes", "record", "faulty")


class Loader:
    """The batches that `sources` make, by split and dataset; this host reads the rows of its own
    devices. `context`: samples before each clip, which teachers hear."""

    def __init__(
        self, config: ConfigDict, sources: Mapping[str, Sequence[Any]], mesh: Mesh, context: int
    ):
        self._config, self._mesh, self._train = config, mesh, sources["train"]
        self._held_out = [
            (source, bad_records.BadRecords(None, [source], config.data.max_faulty))
            for source in sources["validation"]
        ]
        self._clips = dict(num_samples=config.data.num_samples, hop=HOP_LENGTH, context=context)

    def _put(self, batch: Mapping[str, Any], batch_size: int) -> Batch:
        put = lambda rows: sharding.global_batch(np.asarray(rows), batch_size, self._mesh)
        return jax.tree.map(put, {name: batch[name] for name in USED})

    def train(self, start: int) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ..., without end."""
        config = self._config
        stream = pipeline.train_stream(
            self._train,
            weights=config.data.weights,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            rows=sharding.rows_of_host(config.batch_size, self._mesh),
            threads=config.data.threads,
            workers=config.data.workers,
            **self._clips,
        )
        return pipeline.prefetch(stream, lambda batch: self._put(batch, config.batch_size))

    def validation(self) -> list[Iterator[Batch]]:
        """For each dataset, one crop of every record, in micro-batches."""
        size = self._config.batch_size // self._config.accumulation
        rows = sharding.rows_of_host(size, self._mesh)

        def of(source: Any, replaced: bad_records.BadRecords) -> Iterator[Batch]:
            batches = pipeline.validation_batches(source, batch_size=size, rows=rows, **self._clips)
            noted = bad_records.count_bad_records(batches, replaced)
            yield from pipeline.prefetch(noted, lambda batch: self._put(batch, size))

        return [of(*each) for each in self._held_out]
