"""The prepared datasets of a run, and their batches on its mesh."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mert_jax import sharding
from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import bad_records, pipeline, records, stored_codes
from mert_jax.data.stored_codes import CodesInfo
from mert_jax.errors import UserError

Batch = dict[str, Any]
BATCH_KEYS = ("audio", "looped", "codes", "record", "faulty")
Stored = Mapping[str, CodesInfo]  # codes that come with the batches, by teacher
Summaries = Sequence[Mapping[str, Any]]


def find_stored_codes(directories: Sequence[str], checkpoints: Mapping[str, str]) -> Stored:
    """Return the codes that all datasets store of the same codec.

    Raises UserError if they differ, for a teacher without a checkpoint in `checkpoints`.
    """
    stored = {}
    for teacher, checkpoint in checkpoints.items():
        infos = {directory: stored_codes.read_info(directory, teacher) for directory in directories}
        codecs = {directory: info.codec for directory, info in infos.items() if info}
        if not codecs:
            continue
        first = next(iter(codecs))
        others = [each for each in directories if codecs.get(each) != codecs[first]]
        if not others:
            stored[teacher] = infos[first]
            continue
        problem = f"{others[0]} does not store the codes of {teacher} that {first} does"
        if not checkpoint:
            raise UserError(
                f"{problem}; set teacher.{teacher}.checkpoint to compute them, or run python -m "
                f"mert_jax.prepare --output={others[0]} --codes=CHECKPOINT with the same codec"
            )
        print(f"{problem}: they are computed for every dataset", flush=True)
    return stored


def open_datasets(
    directories: Sequence[str], split: str, stored: Stored, num_samples: int, max_faulty: float
) -> list[records.RecordSource]:
    """Open the records of each dataset, with the codes that it has `stored`.

    Raises UserError for clips that are too long, and if more than `max_faulty` records are missing.
    """
    sources = []
    for directory in directories:
        overlap = records.metadata(directory)["overlap_samples"]
        if num_samples > overlap:
            raise UserError(
                f"data.num_samples={num_samples} is longer than the {overlap} that {directory} was "
                f"prepared for; prepare it with --crop_seconds={num_samples / SAMPLE_RATE:g}"
            )
        infos = {teacher: stored_codes.read_info(directory, teacher) for teacher in stored}
        sources.append(records.open_source(directory, split, max_faulty))
        stored_codes.attach(sources[-1], split, infos, max_faulty)
    return sources


def dataset_summaries(directories: Sequence[str], weights: Sequence[float]) -> Summaries:
    """Return name, size, weight and fingerprint of each dataset, for the model card."""
    summaries = []
    weights = weights or ["by its records"] * len(directories)
    for directory, weight in zip(directories, weights, strict=True):
        metadata = records.metadata(directory)
        size = {key: metadata["splits"]["train"][key] for key in ("tracks", "hours")}
        name = os.path.basename(os.path.abspath(directory))
        identity = dict(weight=weight, fingerprint=metadata["fingerprint"])
        summaries.append({"dataset": name} | size | identity)
    return tuple(summaries)


def check_unchanged(before: Summaries, now: Summaries, accept: bool) -> None:
    """Raise UserError, or print a line to `accept` it, if a run began with other datasets.

    `before` is empty until it begins. A dataset that was only moved has not changed.
    """
    if not before or [x["fingerprint"] for x in before] == [x["fingerprint"] for x in now]:
        return
    then, new = (
        ", ".join(f"{x['dataset']} (fingerprint {x['fingerprint'][:8]})" for x in summaries)
        for summaries in (before, now)
    )
    change = f"the datasets are {new}, but the run began with {then}"
    if not accept:
        way_out = "Restore the old ones, or go on with other batches by"
        raise UserError(f"{change}. {way_out} --config.data.accept_changes=True")
    print(f"{change}: accepted (data.accept_changes)", flush=True)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes global batches of a run's `sources`; each host reads the rows of its own devices."""

    sources: Mapping[str, Sequence[Any]]  # of the splits "train" and "validation"
    mesh: Mesh
    batch_size: int
    micro_batch_size: int  # clips of a validation batch
    num_samples: int  # of a clip
    context: int  # samples before each clip
    weights: Sequence[float]  # ratio of the datasets' clips, () for that of their records
    seed: int
    max_faulty: float  # largest fraction of clips whose record was replaced
    threads: int
    workers: int

    @functools.cached_property
    def _bad_records(self) -> list[bad_records.BadRecords]:
        sources = self.sources["validation"]
        return [bad_records.BadRecords(None, [source], self.max_faulty) for source in sources]

    def _on_mesh(self, batches: Iterator[Any], batch_size: int) -> Iterator[Batch]:
        def put(batch: Mapping[str, Any]) -> Batch:
            rows = {key: batch[key] for key in BATCH_KEYS}
            return jax.tree.map(lambda x: sharding.global_batch(x, batch_size, self.mesh), rows)

        return pipeline.prefetch(batches, put)

    def train(self, start: int) -> Iterator[Batch]:
        """Return batches `start`, `start` + 1, ..., without end."""
        stream = pipeline.train_stream(
            self.sources["train"],
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            seed=self.seed,
            weights=self.weights,
            context=self.context,
            start=start,
            rows=sharding.rows_of_host(self.batch_size, self.mesh),
            threads=self.threads,
            workers=self.workers,
        )
        return self._on_mesh(stream, self.batch_size)

    def validation(self) -> list[Iterator[Batch]]:
        """Return, for each dataset, batches of one clip of every record."""
        size, context, streams = self.micro_batch_size, self.context, []
        rows = sharding.rows_of_host(size, self.mesh)
        for source, bad in zip(self.sources["validation"], self._bad_records, strict=True):
            batches = pipeline.validation_batches(
                source, num_samples=self.num_samples, batch_size=size, context=context, rows=rows
            )
            streams.append(self._on_mesh(bad_records.count_bad_records(batches, bad), size))
        return streams
