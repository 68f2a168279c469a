"""Stores an RVQ-VAE's codes of whole tracks beside a prepared dataset's audio.

Tracks go through the encoder side by side in pieces, with the codes of the whole track. Finished
tracks are saved, so that an interrupted run resumes; earlier codes of the same codec are copied.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mert_jax import sharding, teachers
from mert_jax.constants import FULL_SCALE, HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import records, stored_codes
from mert_jax.data.preparation.assemble import TRACKS, Stored, stored_tracks
from mert_jax.files import atomic_write, read_jsonl
from mert_jax.models import encodec, quantize
from mert_jax.teachers import rvq_vae
from mert_jax.teachers.teacher import Teacher

NAME = "rvq_vae"
LANES = 8  # tracks side by side on each device
PIECE = 600 * HOP_LENGTH  # 8 s
# below this the padding of the first piece would reach past the track's end
SHORTEST = 8 * HOP_LENGTH


class Lane(NamedTuple):
    """A track in the encoder: the pieces still to encode, and the codes of those encoded."""

    track: str
    pieces: Iterator[np.ndarray]
    codes: list[np.ndarray]


def encode(directory: str, checkpoint: str, bar: tqdm) -> stored_codes.CodesInfo:
    """Store the codes of every track of the dataset in `directory`; `bar` counts seconds of audio.

    Raises UserError for a checkpoint that cannot be read, OSError if writing fails.
    """
    teacher = teachers.make(NAME, checkpoint=checkpoint)
    fingerprint = teachers.fingerprint(teacher)
    metadata = records.metadata(directory)
    root = stored_codes.folder(directory, NAME)
    staging = os.path.join(root, ".staging", fingerprint)
    os.makedirs(staging, exist_ok=True)
    tracks = stored_tracks(directory)
    sources = {
        split: records.open_source(directory, split)
        for split in sorted({stored.split for stored in tracks.values()})
    }
    bar.total = _seconds(tracks)
    _copy(directory, fingerprint, staging)
    todo = {k: v for k, v in tracks.items() if not os.path.exists(_path(staging, k))}
    bar.update(bar.total - _seconds(todo))
    for track, codes in _encode(teacher, todo, sources, bar):
        _save_track(staging, track, codes)
    return _assemble(directory, staging, teacher, fingerprint, tracks, sources, metadata)


def _seconds(tracks: dict[str, Stored]) -> float:
    return sum(stored.samples for stored in tracks.values()) / SAMPLE_RATE


def _path(staging: str, track: str) -> str:
    return os.path.join(staging, f"{track}.npy")


def _save_track(staging: str, track: str, codes: np.ndarray) -> None:
    with atomic_write(_path(staging, track), replace=True) as path, open(path, "wb") as file:
        np.save(file, codes)


def track_audio(source: Any, stored: Stored, piece: int = PIECE) -> Iterator[np.ndarray]:
    """Yield the int16 samples of a track in pieces of `piece`, from its overlapping records."""
    waiting, read, index = np.empty(0, np.int16), 0, stored.first
    while read < stored.samples:
        record = source[index]
        new = record["audio"][read - record["offset"] :]
        waiting, read, index = np.concatenate([waiting, new]), read + len(new), index + 1
        while len(waiting) >= piece:
            yield waiting[:piece]
            waiting = waiting[piece:]
    if len(waiting):
        yield waiting


def _encode(
    teacher: Teacher, todo: dict[str, Stored], sources: dict[str, Any], bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tracks and their codes uint16 [T, K] as they finish; the longest start first."""
    network = rvq_vae.encoder(teacher.params)
    mesh = sharding.make_mesh(-1, 1, 1)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = sharding.placed(teacher.params, sharding.replicated(mesh))

    def apply(params, state, wave, start, length):
        stream = encodec.Stream(start, length)
        variables = {"params": params["encoder"], **state}
        wave = wave.astype(jnp.float32) / FULL_SCALE
        latents, state = network.apply(variables, wave, stream, mutable=["stream"])
        return quantize.residual_encode(latents, params["codebooks"])[0], state

    apply = jax.jit(apply, donate_argnums=1)
    apply_whole = jax.jit(
        lambda params, wave: teacher.apply(params, wave.astype(jnp.float32) / FULL_SCALE)
    )
    waiting = sorted(todo, key=lambda track: todo[track].samples)
    for track in [track for track in waiting if todo[track].samples < SHORTEST]:
        (audio,) = track_audio(sources[todo[track].split], todo[track])
        yield track, np.asarray(apply_whole(params, audio[None])[0], stored_codes.DTYPE)
        waiting.remove(track)
    count = LANES * jax.device_count()
    lanes: list[Lane | None] = [None] * count
    shape = (count, PIECE)
    state = jax.eval_shape(
        apply, params, {}, np.zeros(shape, np.int16), np.zeros(count, bool), np.zeros(count, int)
    )[1]
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), rows), state)
    while waiting or any(lanes):
        wave, start, length = np.zeros(shape, np.int16), np.zeros(count, bool), np.zeros(count, int)
        for i, lane in enumerate(lanes):
            if lane is None and waiting:
                track = waiting.pop()
                pieces = track_audio(sources[todo[track].split], todo[track])
                lanes[i], start[i] = Lane(track, pieces, []), True
            if lanes[i]:
                piece = next(lanes[i].pieces)
                wave[i, : len(piece)], length[i] = piece, len(piece)
        inputs = jax.device_put((wave, start, length), rows)
        codes, state = apply(params, state, *inputs)
        codes = np.asarray(codes, stored_codes.DTYPE)
        for i, lane in enumerate(lanes):
            if lane is None:
                continue
            lane.codes.append(codes[i, : -(-int(length[i]) // HOP_LENGTH)])
            frames = sum(map(len, lane.codes))
            if frames == -(-todo[lane.track].samples // HOP_LENGTH):
                yield lane.track, np.concatenate(lane.codes)
                lanes[i] = None
        bar.update(int(length.sum()) / SAMPLE_RATE)


def _copy(directory: str, fingerprint: str, staging: str) -> None:
    """Copy the codes that the dataset already stores to `staging`, if this codec made them."""
    root = stored_codes.folder(directory, NAME)
    rows = read_jsonl(os.path.join(root, stored_codes.INFO))
    if not rows or rows[0].get("fingerprint") != fingerprint:
        return
    info = stored_codes.CodesInfo(**rows[0])
    opened = {split: stored_codes.CodesSource(directory, split, info) for split in info.shards}
    for line in read_jsonl(os.path.join(root, TRACKS)):
        if os.path.exists(_path(staging, line["track"])):
            continue
        parts, frames = [], 0
        for index, offset in enumerate(line["offsets"], line["first"]):
            parts.append(opened[line["split"]][index][frames - offset // HOP_LENGTH :])
            frames += len(parts[-1])
        _save_track(staging, line["track"], np.concatenate(parts))


def _assemble(
    directory: str,
    staging: str,
    teacher: Teacher,
    fingerprint: str,
    tracks: dict[str, Stored],
    sources: dict[str, Any],
    metadata: dict[str, Any],
) -> stored_codes.CodesInfo:
    """Cut the tracks' codes into records aligned with those of the audio, and write codes.json."""
    root = stored_codes.folder(directory, NAME)
    books = len(teacher.params["codebooks"])
    chunk, overlap = metadata["chunk_samples"], metadata["overlap_samples"]
    info_path = os.path.join(root, stored_codes.INFO)
    if os.path.exists(info_path):
        os.unlink(info_path)  # until the new codes are complete, the dataset has none
    counts, shards, manifest = {}, {}, []
    for split, source in sources.items():
        histogram = np.zeros((books, teacher.size), np.int64)

        def serialised(split=split, histogram=histogram) -> Iterator[bytes]:
            members = [(k, v) for k, v in tracks.items() if v.split == split]
            for track, stored in sorted(members, key=lambda item: item[1].first):
                codes = np.load(_path(staging, track))
                histogram += [np.bincount(column, minlength=teacher.size) for column in codes.T]
                spans = records.chunk_spans(stored.samples, chunk, overlap)
                line = dict(track=track, split=split, first=stored.first)
                manifest.append(line | {"offsets": [start for start, _ in spans]})
                for start, stop in spans:
                    yield codes[start // HOP_LENGTH : -(-stop // HOP_LENGTH)].tobytes()

        stream, shards[split] = serialised(), []
        lengths = source.shard_lengths()
        for shard, length in enumerate(lengths):
            name = f"{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
            with atomic_write(os.path.join(root, name), replace=True) as path:
                records.write_shard(path, itertools.islice(stream, length))
            shards[split].append(name)
        counts[split] = histogram.tolist()
    info = stored_codes.CodesInfo(
        NAME, books, teacher.size, HOP_LENGTH, fingerprint, metadata["fingerprint"], counts, shards
    )
    _write_lines(os.path.join(root, TRACKS), manifest)
    _write_lines(info_path, [info._asdict()])
    shutil.rmtree(os.path.join(root, ".staging"))
    current = {stored_codes.INFO, TRACKS, *itertools.chain(*shards.values())}
    for name in set(os.listdir(root)) - current:
        os.unlink(os.path.join(root, name))
    return info


def _write_lines(path: str, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path, replace=True) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
