"""Assembles decoded tracks into a dataset beside the old one, then moves it into place.

Tracks are ordered by their hashes, so that equal music gives equal shards.
"""

import glob
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mert_jax import progress
from mert_jax.data import records
from mert_jax.data.preparation.sources import audio_path
from mert_jax.errors import UserError

TRACKS = "tracks.jsonl"
SHARD_BYTES = 256 * 1000**2
Splits = Mapping[str, Sequence["Track"]]


class Track(NamedTuple):
    """A track of a source file; in a dataset, its records in `split` begin with `first`."""

    track: str  # hash of its samples
    path: str
    samples: int
    split: str = ""
    first: int = 0


def split_tracks(tracks: Sequence[Track], fraction: float) -> Splits:
    """Split tracks by their hashes, which adding music does not change; no split stays empty."""
    ordered = sorted(tracks)
    count = sum(int(t.track, 16) < fraction * 16.0 ** len(t.track) for t in ordered)
    count = min(max(count, 1), len(ordered) - 1) if fraction else 0
    return {"train": ordered[count:], "validation": ordered[:count]}


def shard_lengths(sizes: Sequence[int], shard_bytes: int) -> list[int]:
    """Return how many records of `sizes` bytes each shard of at most `shard_bytes` takes."""
    lengths, filled = [], 0
    for size in sizes:
        if not lengths or filled + size > shard_bytes:
            lengths.append(0)
            filled = 0
        lengths[-1] += 1
        filled += size
    return lengths


def stored_tracks(output: str) -> dict[str, Track]:
    """Return the tracks of a finished dataset by hash, {} if there is none."""
    if not os.path.exists(os.path.join(output, records.INFO)):
        return {}
    try:
        with open(os.path.join(output, TRACKS)) as file:
            tracks = [Track(**json.loads(line)) for line in file]
    except FileNotFoundError:
        problem = f"{output} lacks {TRACKS}; remove it and run again, or give another --output"
        raise UserError(problem) from None
    return {track.track: track for track in tracks}


def build(splits: Splits, output: str, staging: str, metadata: Mapping[str, Any]) -> str:
    """Write a dataset below `staging` and return its path. Raises OSError if writing fails."""
    building = os.path.join(staging, "building")
    shutil.rmtree(building, ignore_errors=True)
    os.makedirs(building)
    chunk, overlap = metadata["chunk_samples"], metadata["overlap_samples"]
    chunks, written = {}, {}
    with open(os.path.join(building, TRACKS), "w") as manifest:
        for split, tracks in splits.items():
            chunks[split] = []
            for track in tracks:
                track = track._replace(split=split, first=len(chunks[split]))
                manifest.write(json.dumps(track._asdict()) + "\n")
                spans = records.chunk_spans(track.samples, chunk, overlap)
                chunks[split] += [(track, start, stop) for start, stop in spans]
    size = 2 * sum(stop - start for each in chunks.values() for _, start, stop in each)
    if size > (free := shutil.disk_usage(building).free):
        lack = f"{output} has {free / 1e9:.2f} GB free, and needs {size / 1e9:.2f} GB more"
        raise UserError(f"{lack}; make room and run the command again (decoded files are kept)")
    with progress.bar("writing", size, "B") as bar:
        for split in filter(chunks.get, splits):
            stream, num_bytes = _serialised(chunks[split], output, staging, bar), 0
            sizes = [2 * (stop - start) for _, start, stop in chunks[split]]
            lengths = shard_lengths(sizes, SHARD_BYTES)
            for shard, length in enumerate(lengths):
                path = os.path.join(building, records.shard_name(split, shard, len(lengths)))
                num_bytes += records.write_shard(path, itertools.islice(stream, length))
            written[split] = lengths, num_bytes
    records.write_info(building, written, metadata)
    return building


def _serialised(
    chunks: Sequence[tuple[Track, int, int]], output: str, staging: str, bar: tqdm
) -> Iterator[bytes]:
    """Yield records with the samples in `staging`, or else of the dataset in `output`."""
    stored = stored_tracks(output)
    splits = {track.split for track in stored.values()}
    sources = {split: records.open_source(output, split) for split in splits}
    for index, (track, start, stop) in enumerate(chunks):
        path = audio_path(staging, track.track)
        if os.path.exists(path):
            audio = np.fromfile(path, "<i2", stop - start, offset=2 * start)
        else:
            old = stored[track.track]
            audio = sources[old.split][old.first + index - track.first]["audio"]
        assert len(audio) == stop - start, (track, start, stop, len(audio))
        bar.update(audio.nbytes)
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
    ready, info = os.path.join(staging, "ready"), os.path.join(output, records.INFO)
    new_info, retired = os.path.join(ready, records.INFO), os.path.join(staging, "retired.json")
    if not os.path.isdir(ready):
        return
    if os.path.exists(new_info):
        if os.path.exists(info):
            os.replace(info, retired)
        if os.path.exists(retired):  # no new shard has been moved yet: all shards are old
            pattern = f"{records.NAME}-*.array_record-*-of-*"
            for shard in glob.glob(os.path.join(glob.escape(output), pattern)):
                os.unlink(shard)
            os.unlink(retired)
        for name in sorted(set(os.listdir(ready)) - {records.INFO}):
            os.replace(os.path.join(ready, name), os.path.join(output, name))
        os.replace(new_info, info)
    # complete; files that a worker of a killed run still writes are removed by the next run
    shutil.rmtree(staging, ignore_errors=True)
