"""Codes of whole tracks by an RVQ-VAE, stored beside a prepared dataset's audio.

Tracks of any length go side by side through the encoder, piece by piece, each as if encoded in one
go. A finished track is kept in a file, so that an interrupted run goes on; tracks that earlier
codes of the same codec hold are copied.
"""

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
from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import records, stored_codes
from mert_jax.data.preparation.assemble import Stored, stored_tracks
from mert_jax.models import encodec, quantize
from mert_jax.teachers import rvq_vae
from mert_jax.teachers.teacher import Teacher

NAME = "rvq_vae"
HOP = HOP_LENGTH
LANES = 8  # tracks side by side on each device
PIECE = 600 * HOP  # 8 s
# below this the padding of the first piece would reach past the track's end
SHORTEST = 8 * HOP


class Lane(NamedTuple):
    """A track on its way through the encoder: its pieces to come, and the codes of those gone."""

    track: str
    pieces: Iterator[np.ndarray]
    found: list[np.ndarray]


def encode(directory: str, checkpoint: str, bar: tqdm) -> stored_codes.CodesInfo:
    """Store the codes of every track of the dataset in `directory`; `bar` counts seconds of audio.

    Raises UserError for a checkpoint that cannot be read, and OSError where writing fails.
    """
    teacher = teachers.make(NAME, checkpoint=checkpoint)
    fingerprint = teachers.fingerprint(teacher)
    metadata = records.metadata(directory)
    root = stored_codes.folder(directory, NAME)
    held = os.path.join(root, ".staging", fingerprint)
    os.makedirs(held, exist_ok=True)
    tracks = stored_tracks(directory)
    sources = {
        split: records.open_source(directory, split)
        for split in sorted({stored.split for stored in tracks.values()})
    }
    seconds = lambda some: sum(stored.samples for stored in some.values()) / SAMPLE_RATE
    bar.total = seconds(tracks)
    _copy(directory, fingerprint, held)
    todo = {k: v for k, v in tracks.items() if not os.path.exists(_path(held, k))}
    bar.update(bar.total - seconds(todo))
    for track, found in _encode(teacher, todo, sources, bar):
        _keep(held, track, found)
    return _assemble(directory, held, teacher, fingerprint, tracks, sources, metadata)


def _path(held: str, track: str) -> str:
    return os.path.join(held, f"{track}.npy")


def _keep(held: str, track: str, found: np.ndarray) -> None:
    path = _path(held, track)
    with open(f"{path}.partial", "wb") as file:
        np.save(file, found)
    os.replace(f"{path}.partial", path)


def track_audio(source: Any, stored: Stored, piece: int = PIECE) -> Iterator[np.ndarray]:
    """The samples int16 of a track in pieces of `piece`, from its records, which overlap."""
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
    teacher: Teacher,
    todo: dict[str, Stored],
    sources: dict[str, Any],
    bar: tqdm,
) -> Iterator[tuple[str, np.ndarray]]:
    """Tracks and their codes uint16 [T, K], as they are done: the longest begin first."""
    network = rvq_vae.encoder(teacher.params)
    mesh = sharding.make_mesh(-1, 1, 1)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = sharding.placed(teacher.params, sharding.replicated(mesh))

    def apply(params, state, wave, start, length):
        stream = encodec.Stream(start, length)
        variables = {"params": params["encoder"], **state}
        wave = wave.astype(jnp.float32) / 32768
        latents, state = network.apply(variables, wave, stream, mutable=["stream"])
        return quantize.residual_encode(latents, params["codebooks"])[0], state

    apply = jax.jit(apply, donate_argnums=1)
    whole = jax.jit(lambda params, wave: teacher.apply(params, wave.astype(jnp.float32) / 32768))
    waiting = sorted(todo, key=lambda track: todo[track].samples)
    for track in [track for track in waiting if todo[track].samples < SHORTEST]:
        (audio,) = track_audio(sources[todo[track].split], todo[track])
        yield track, np.asarray(whole(params, audio[None])[0], stored_codes.DTYPE)
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
        found, state = apply(params, state, *inputs)
        found = np.asarray(found, stored_codes.DTYPE)
        for i, lane in enumerate(lanes):
            if lane is None:
                continue
            lane.found.append(found[i, : -(-int(length[i]) // HOP)])
            frames = sum(map(len, lane.found))
            if frames == -(-todo[lane.track].samples // HOP):
                yield lane.track, np.concatenate(lane.found)
                lanes[i] = None
        bar.update(int(length.sum()) / SAMPLE_RATE)


def _copy(directory: str, fingerprint: str, held: str) -> None:
    """Keep the tracks of the codes that are there, if they are of this codec."""
    root = stored_codes.folder(directory, NAME)
    path = os.path.join(root, stored_codes.INFO)
    if not os.path.exists(path):
        return
    with open(path) as f:
        before = stored_codes.CodesInfo(**json.load(f))
    if before.fingerprint != fingerprint:
        return
    with open(os.path.join(root, "tracks.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    opened = {split: stored_codes.CodesSource(directory, split, before) for split in before.shards}
    for line in lines:
        if os.path.exists(_path(held, line["track"])):
            continue
        parts, frames = [], 0
        for index, offset in enumerate(line["offsets"], line["first"]):
            parts.append(opened[line["split"]][index][frames - offset // HOP :])
            frames += len(parts[-1])
        _keep(held, line["track"], np.concatenate(parts))


def _assemble(
    directory: str,
    held: str,
    teacher: Teacher,
    fingerprint: str,
    tracks: dict[str, Stored],
    sources: dict[str, Any],
    metadata: dict[str, Any],
) -> stored_codes.CodesInfo:
    """Cut the tracks' codes into records like those of the audio, and say so in codes.json."""
    root = stored_codes.folder(directory, NAME)
    books = len(teacher.params["codebooks"])
    chunk, overlap = metadata["chunk_samples"], metadata["overlap_samples"]
    info = os.path.join(root, stored_codes.INFO)
    if os.path.exists(info):
        os.unlink(info)  # from here on there are no codes until they are whole
    counts, shards, manifest = {}, {}, []
    for split, source in sources.items():
        histogram = np.zeros((books, teacher.size), np.int64)

        def serialised(split=split, histogram=histogram) -> Iterator[bytes]:
            mine = [(k, v) for k, v in tracks.items() if v.split == split]
            for track, stored in sorted(mine, key=lambda item: item[1].first):
                whole = np.load(_path(held, track))
                for k, column in enumerate(whole.T):
                    histogram[k] += np.bincount(column, minlength=histogram.shape[1])
                spans = records.chunk_spans(stored.samples, chunk, overlap)
                line = dict(track=track, split=split, first=stored.first)
                manifest.append(line | {"offsets": [start for start, _ in spans]})
                for start, stop in spans:
                    yield whole[start // HOP : -(-stop // HOP)].tobytes()

        stream, shards[split] = serialised(), []
        lengths = source.shard_lengths()
        for shard, length in enumerate(lengths):
            name = f"{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
            path = os.path.join(root, name)
            records.write_shard(f"{path}.partial", (next(stream) for _ in range(length)))
            os.replace(f"{path}.partial", path)
            shards[split].append(name)
        counts[split] = histogram.tolist()
    made = stored_codes.CodesInfo(
        NAME, books, teacher.size, HOP, fingerprint, metadata["fingerprint"], counts, shards
    )
    _write(os.path.join(root, "tracks.jsonl"), "".join(json.dumps(x) + "\n" for x in manifest))
    _write(info, json.dumps(made._asdict()) + "\n")
    shutil.rmtree(os.path.join(root, ".staging"))
    current = {
        stored_codes.INFO,
        "tracks.jsonl",
        *(name for names in shards.values() for name in names),
    }
    for name in set(os.listdir(root)) - current:
        os.unlink(os.path.join(root, name))
    return made


def _write(path: str, text: str) -> None:
    with open(path + ".partial", "w") as file:
        file.write(text)
    os.replace(path + ".partial", path)
