"""Assembles decoded tracks into a dataset, and replaces the old dataset by it.

Tracks are ordered by their hashes, so that equal music gives equal shards. A new dataset is built
beside the old one, then moved into place, dataset_info.json last; the next run completes an
interrupted move.
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
    """Position of a track in a finished dataset: its records are first, first + 1, ..."""

    path: str
    samples: int
    split: str
    first: int


def split_tracks(tracks: Sequence[Track], fraction: float) -> dict[str, list[Track]]:
    """Split tracks into train and validation by their hashes, so that adding music moves no track.

    Unless `fraction` is 0, neither split of two tracks or more is empty: the smallest hash is in
    validation, the largest in train.
    """
    ordered = sorted(tracks)
    count = sum(int(t.track, 16) < fraction * 16.0 ** len(t.track) for t in ordered)
    empty = len(ordered) < 2 or fraction == 0
    count = 0 if empty else min(max(count, 1), len(ordered) - 1)
    return {"train": ordered[count:], "validation": ordered[:count]}


def assign_shards(sizes: Sequence[int], shard_bytes: int) -> list[int]:
    """Return the shard of each record of `sizes` bytes; a shard has at most `shard_bytes`."""
    shards = []
    shard = filled = 0
    for size in sizes:
        if filled and filled + size > shard_bytes:
            shard, filled = shard + 1, 0
        filled += size
        shards.append(shard)
    return shards


def stored_tracks(output: str) -> dict[str, Stored]:
    """Return the tracks of a finished dataset by hash, {} if there is none."""
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
    progress: Callable[[int], Any],
) -> str:
    """Write a dataset below the staging directory and return its path.

    Samples come from the staging directory, else from the dataset in `output`. `progress` gets the
    bytes of audio of each record. Raises OSError if writing fails.
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
            first = 0
            for t, s in zip(tracks, spans, strict=True):
                line = Stored(t.path, t.samples, split, first)._asdict()
                manifest.write(json.dumps({"track": t.track} | line) + "\n")
                first += len(s)
            if not sizes:
                continue
            stream = _serialised(tracks, spans, output, staging, stored, progress)
            lengths = list(collections.Counter(assign_shards(sizes, SHARD_BYTES)).values())
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
    progress: Callable[[int], Any],
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
            progress(audio.nbytes)
            yield records.encode(track.track, track.path, start, audio)


def finish(building: str, staging: str) -> None:
    """Flush a built dataset to disk and mark it complete: the next switch moves it into place."""
    for name in os.listdir(building):
        with open(os.path.join(building, name), "rb") as file:
            os.fsync(file.fileno())
    os.rename(building, os.path.join(staging, "ready"))


def switch(output: str, staging: str) -> None:
    """Move a complete dataset, if there is one, from the staging directory to `output`.

    May be interrupted and called again: until the last move `output` does not open as a dataset.
    """
    ready = os.path.join(staging, "ready")
    if not os.path.isdir(ready):
        return
    info, retired = os.path.join(output, records.INFO), os.path.join(staging, "retired.json")
    new_info = os.path.join(ready, records.INFO)
    if os.path.exists(new_info):
        if os.path.exists(info):
            os.replace(info, retired)
        if os.path.exists(retired):  # no new shard has been moved yet: all shards are old
            pattern = f"{records.NAME}-*.array_record-*-of-*"
            for shard in glob.glob(os.path.join(glob.escape(output), pattern)):
                os.unlink(shard)
            os.unlink(retired)
        for name in sorted(os.listdir(ready)):
            if name != records.INFO:
                os.replace(os.path.join(ready, name), os.path.join(output, name))
        os.replace(new_info, info)
    # complete; files that a worker of a killed run still writes are removed by the next run
    shutil.rmtree(staging, ignore_errors=True)
