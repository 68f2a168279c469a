"""Mean hidden states of many recordings as one Parquet file, a row each."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP = 1024  # rows that are held at a time


def write_table(
    path: str, rows: Iterable[tuple[dict[str, Any], np.ndarray]], layers: list[int]
) -> None:
    """Write a row for each recording's columns and hidden states [layers, D], which become a column
    `layer_L` each, of vectors. OSError where the disk does not take them."""
    writer = None
    for group in _groups(rows):
        columns, states = zip(*group, strict=True)
        stacked = np.stack(states)
        arrays = {name: pa.array([row[name] for row in columns]) for name in columns[0]}
        for i, layer in enumerate(layers):
            flat = pa.array(np.ascontiguousarray(stacked[:, i]).reshape(-1))
            arrays[f"layer_{layer}"] = pa.FixedSizeListArray.from_arrays(flat, stacked.shape[-1])
        batch = pa.table(arrays)
        if writer is None:
            writer = pq.ParquetWriter(path, batch.schema)
        writer.write_table(batch)
    if writer:
        writer.close()


def _groups(rows: Iterable[Any]) -> Iterator[list[Any]]:
    group: list[Any] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group
