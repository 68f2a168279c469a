"""Decoded tracks put together as one dataset, and the switch from the old dataset to the new.

The order is that of the tracks' hashes, so equal music gives equal shards. A new dataset is built
whole beside the old one, then moved into place with dataset_info.json last; a switch that was
interrupted is finished by the next run.
"""

import collections
import glob
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax.data import records
from mert_jax.data.preparation.staging import audio_path
from mert_jax.errors import UserError

TRACKS = "tracks.jsonl"
SHARD_BYTES = 256 * 1000**2


class Track(NamedTuple):
    """A track of the dataset; `path` is the name of its source file."""

    track: str
    path: str
    samples: int


class Stored(NamedTuple):
    """Where a finished dataset keeps a track: its records are first, first + 1, ..."""

    path: str
    samples: int
    split: str
    first: int


def split_tracks(tracks: Sequence[Track], fraction: float) -> dict[str, list[Track]]:
    """Divide tracks, each by its own hash, so that adding music moves no track to the other side.

    With two tracks or more neither side is empty: the smallest hash is then in validation and the
    largest in train, whatever the fraction (a fraction of 0 asks for no validation, and gets none).
    """
    ordered = sorted(tracks)
    held = [t for t in ordered if int(t.track, 16) < fraction * 16.0 ** len(t.track)]
    if len(ordered) < 2 or fraction == 0:
        held = []
    elif not held:
        held = ordered[:1]
    elif len(held) == len(ordered):
        held = ordered[:-1]
    return {"train": ordered[len(held) :], "validation": held}


def assign_shards(sizes: Sequence[int], shard_bytes: int) -> list[int]:
    """Give each record, of `sizes` bytes, its shard: the next one once `shard_bytes` are full."""
    shards = []
    shard = filled = 0
    for size in sizes:
        if filled and filled + size > shard_bytes:
            shard, filled = shard + 1, 0
        filled += size
        shards.append(shard)
    return shards


def stored_tracks(output: str) -> dict[str, Stored]:
    """The tracks in the shards of a finished dataset, by hash; empty where there is none."""
    if not os.path.exists(os.path.join(output, records.INFO)):
        return {}
    try:
        with open(os.path.join(output, TRACKS)) as file:
            lines = [json.loads(line) for line in file]
    except FileNotFoundError:
        raise UserError(
            f"{output} lacks {TRACKS}, which names its tracks; remove {output} and run again, or "
            "give another --output"
        ) from None
    return {line.pop("track"): Stored(**line) for line in lines}


def build(
    splits: dict[str, list[Track]],
    output: str,
    staging: str,
    metadata: dict[str, Any],
    shard_bytes: int,
    progress: Callable[[int], None],
) -> str:
    """Write the dataset into the staging directory, complete but for `ready`, and return where.

    Samples come from the staging directory or else from the dataset now in `output`. `progress`
    gets the samples of each record. Raises OSError where writing fails.
    """
    building = os.path.join(staging, "building")
    shutil.rmtree(building, ignore_errors=True)
    os.makedirs(building)
    chunk, overlap = metadata["chunk_samples"], metadata["overlap_samples"]
    stored = stored_tracks(output)
    written = {}
    with open(os.path.join(building, TRACKS), "w") as manifest:
        for split, tracks in splits.items():
            spans = [records.chunk_spans(t.samples, chunk, overlap) for t in tracks]
            sizes = [2 * (stop - start) for s in spans for start, stop in s]
            shards = assign_shards(sizes, shard_bytes)
            first = 0
            for t, s in zip(tracks, spans, strict=True):
                line = Stored(t.path, t.samples, split, first)._asdict()
                manifest.write(json.dumps({"track": t.track} | line) + "\n")
                first += len(s)
            if not sizes:
                continue
            stream = _serialised(tracks, spans, output, staging, stored, progress)
            lengths = list(collections.Counter(shards).values())
            num_bytes = 0
            for shard, length in enumerate(lengths):
                name = records.shard_name(split, shard, len(lengths))
                batch = itertools.islice(stream, length)
                num_bytes += records.write_shard(os.path.join(building, name), batch)
            written[split] = records.Split(lengths, num_bytes)
    records.write_info(building, written, metadata)
    return building


def _serialised(
    tracks: Sequence[Track],
    spans: Sequence[Sequence[tuple[int, int]]],
    output: str,
    staging: str,
    stored: dict[str, Stored],
    progress: Callable[[int], None],
) -> Iterator[bytes]:
    sources = {}
    for track, chunks in zip(tracks, spans, strict=True):
        staged = audio_path(staging, track.track)
        old = None if os.path.exists(staged) else stored[track.track]
        if old and old.split not in sources:
            sources[old.split] = records.open_source(output, old.split)
        for k, (start, stop) in enumerate(chunks):
            if old:
                audio = sources[old.split][old.first + k]["audio"]
            else:
                audio = np.fromfile(staged, "<i2", stop - start, offset=2 * start)
            assert len(audio) == stop - start, (track, start, stop, len(audio))
            progress(len(audio))
            yield records.encode(track.track, track.path, start, audio)


def finish(building: str, staging: str) -> None:
    """Declare a built dataset complete: from here on it replaces the old one, come what may."""
    for name in os.listdir(building):
        with open(os.path.join(building, name), "rb") as file:
            os.fsync(file.fileno())
    os.rename(building, os.path.join(staging, "ready"))


def switch(output: str, staging: str) -> bool:
    """Move a complete dataset from the staging directory into `output`; whether there was one.

    May be interrupted anywhere and called again: until the last move nothing opens as a dataset.
    """
    ready = os.path.join(staging, "ready")
    if not os.path.isdir(ready):
        return False
    info, retired = os.path.join(output, records.INFO), os.path.join(staging, "retired.json")
    new_info = os.path.join(ready, records.INFO)
    if os.path.exists(new_info):
        if os.path.exists(info):
            os.replace(info, retired)
        if os.path.exists(retired):  # no new shard has been moved yet: these are the old ones
            for shard in glob.glob(
                os.path.join(glob.escape(output), f"{records.NAME}-*.array_record-*-of-*")
            ):
                os.unlink(shard)
            os.unlink(retired)
        for name in sorted(os.listdir(ready)):
            if name != records.INFO:
                os.replace(os.path.join(ready, name), os.path.join(output, name))
        os.replace(new_info, info)
    # the dataset is complete; what a worker of a killed run may still write is cleared next time
    shutil.rmtree(staging, ignore_errors=True)
    return True
