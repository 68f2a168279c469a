"""Stores an RVQ-VAE's codes of whole tracks beside a prepared dataset's audio.

Tracks go through the encoder side by side in pieces. Finished tracks are saved, so that a run
resumes; earlier codes of the same codec are copied.
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mert_jax import sharding, teachers
from mert_jax.constants import FULL_SCALE, HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import records
from mert_jax.data.preparation.assemble import TRACKS, Track, stored_tracks
from mert_jax.data.stored_codes import DTYPE, INFO, CodesInfo, folder
from mert_jax.files import Row, atomic_write, read_jsonl
from mert_jax.models import encodec, quantize
from mert_jax.teachers import rvq_vae
from mert_jax.teachers.teacher import Teacher

NAME = "rvq_vae"
LANES = 8  # tracks side by side on each device
PIECE = 600 * HOP_LENGTH  # 8 s
Tracks = Mapping[str, Track]  # by hash
Sources = Mapping[str, records.RecordSource]  # by split
SHORTEST = 8 * HOP_LENGTH  # below it, the padding of the first piece would reach past the end


def encode(directory: str, checkpoint: str, bar: tqdm) -> CodesInfo:
    """Store the codes of every track of the dataset in `directory`; `bar` counts seconds of audio.

    Raises UserError for a checkpoint that cannot be read, OSError if writing fails.
    """
    teacher = teachers.make(NAME, checkpoint=checkpoint)
    fingerprint, root = teachers.fingerprint(teacher), folder(directory, NAME)
    staging = os.path.join(root, ".staging", fingerprint)
    os.makedirs(staging, exist_ok=True)
    tracks = stored_tracks(directory)
    splits = sorted({track.split for track in tracks.values()})
    sources = {split: records.open_source(directory, split) for split in splits}
    info = read_jsonl(os.path.join(root, INFO))
    if info and info[0].get("fingerprint") == fingerprint:
        _copy(root, info[0], staging)
    finished = set(os.listdir(staging))
    todo = {k: v for k, v in tracks.items() if f"{k}.npy" not in finished}
    bar.total = sum(track.samples for track in tracks.values()) / SAMPLE_RATE
    bar.update(bar.total - sum(track.samples for track in todo.values()) / SAMPLE_RATE)
    for track, codes in _encode(teacher, todo, sources, bar):
        _save(staging, track, codes)
    return _assemble(directory, staging, teacher, tracks, sources)


def _save(staging: str, track: str, codes: np.ndarray) -> None:
    path = os.path.join(staging, f"{track}.npy")
    with atomic_write(path, replace=True) as temporary, open(temporary, "wb") as file:
        np.save(file, codes)


def track_audio(source: records.RecordSource, track: Track) -> Iterator[np.ndarray]:
    """Yield the int16 samples of a track in pieces of `PIECE`, from its overlapping records."""
    waiting, read, index = np.empty(0, np.int16), 0, track.first
    while read < track.samples:
        record = source[index]
        new = record["audio"][read - record["offset"] :]
        waiting, read, index = np.concatenate([waiting, new]), read + len(new), index + 1
        while len(waiting) >= PIECE or (len(waiting) and read == track.samples):
            yield waiting[:PIECE]
            waiting = waiting[PIECE:]


def _encode(
    teacher: Teacher, todo: Tracks, sources: Sources, bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tracks and their codes uint16 [T, K] as they finish; the longest start first."""
    network = rvq_vae.encoder(teacher.params)
    mesh = sharding.make_mesh(-1, 1, 1)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = sharding.placed(teacher.params, sharding.replicated(mesh))

    @jax.jit
    def apply_whole(params, wave):
        return teacher.apply(params, wave.astype(jnp.float32) / FULL_SCALE)

    @functools.partial(jax.jit, donate_argnums=1)
    def apply(params, state, wave, start, length):
        variables = {"params": params["encoder"], **state}
        inputs = wave.astype(jnp.float32) / FULL_SCALE, encodec.Stream(start, length)
        latents, state = network.apply(variables, *inputs, mutable=["stream"])
        return quantize.residual_encode(latents, params["codebooks"])[0], state

    waiting = sorted(todo.values(), key=lambda track: track.samples)
    while waiting and waiting[0].samples < SHORTEST:
        track = waiting.pop(0)
        (audio,) = track_audio(sources[track.split], track)
        yield track.track, np.asarray(apply_whole(params, audio[None])[0], DTYPE)
    count = LANES * jax.device_count()
    lanes = [None] * count  # of each the track, its pieces to encode, and the codes of the others

    def silence() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.zeros((count, PIECE), np.int16), np.zeros(count, bool), np.zeros(count, int)

    state = jax.eval_shape(apply, params, {}, *silence())[1]
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), rows), state)
    while waiting or any(lanes):
        wave, start, length = silence()
        for i in range(count):
            if not lanes[i] and waiting:
                track = waiting.pop()
                pieces = track_audio(sources[track.split], track)
                lanes[i], start[i] = (track, pieces, []), True
            if lanes[i]:
                piece = next(lanes[i][1])
                wave[i, : len(piece)], length[i] = piece, len(piece)
        codes, state = apply(params, state, *jax.device_put((wave, start, length), rows))
        codes = np.asarray(codes, DTYPE)
        for i in filter(lanes.__getitem__, range(count)):
            track, _, parts = lanes[i]
            parts.append(codes[i, : -(-int(length[i]) // HOP_LENGTH)])
            if sum(map(len, parts)) == -(-track.samples // HOP_LENGTH):
                yield track.track, np.concatenate(parts)
                lanes[i] = None
        bar.update(int(length.sum()) / SAMPLE_RATE)


def _copy(root: str, info: Row, staging: str) -> None:
    """Copy the codes of tracks in `root` to `staging`."""
    rows = read_jsonl(os.path.join(root, TRACKS))  # in the order of the records
    for split, names in info["shards"].items():
        shards = (records.read_shard(os.path.join(root, name)) for name in names)
        stored = itertools.chain.from_iterable(shards)
        for row in rows:
            if row["split"] == split:
                parts, frames = [], 0
                # zip stops after the last offset, before it takes the next track's codes
                for offset, part in zip(row["offsets"], stored, strict=False):
                    codes = np.frombuffer(part, DTYPE).reshape(-1, info["books"])
                    parts.append(codes[frames - offset // HOP_LENGTH :])
                    frames += len(parts[-1])
                _save(staging, row["track"], np.concatenate(parts))


def _assemble(
    directory: str, staging: str, teacher: Teacher, tracks: Tracks, sources: Sources
) -> CodesInfo:
    """Cut the tracks' codes into records aligned with those of the audio, and write codes.json."""
    root, metadata = folder(directory, NAME), records.metadata(directory)
    books, size = len(teacher.params["codebooks"]), teacher.size
    pathlib.Path(root, INFO).unlink(missing_ok=True)  # until the new codes are complete
    counts, shards, manifest = {}, {}, []

    def serialised(split: str) -> Iterator[bytes]:
        members = (track for track in tracks.values() if track.split == split)
        for track in sorted(members, key=lambda track: track.first):
            codes = np.load(os.path.join(staging, f"{track.track}.npy"))
            counts[split] += [np.bincount(column, minlength=size) for column in codes.T]
            lengths = metadata["chunk_samples"], metadata["overlap_samples"]
            spans = records.chunk_spans(track.samples, *lengths)
            row = dict(track=track.track, split=split, first=track.first)
            manifest.append(row | {"offsets": [start for start, _ in spans]})
            for start, stop in spans:
                yield codes[start // HOP_LENGTH : -(-stop // HOP_LENGTH)].tobytes()

    for split, source in sources.items():
        counts[split], stream = np.zeros((books, size), np.int64), serialised(split)
        number = len(source.lengths)
        shards[split] = [f"{split}.array_record-{i:05d}-of-{number:05d}" for i in range(number)]
        for name, length in zip(shards[split], source.lengths, strict=True):
            with atomic_write(os.path.join(root, name), replace=True) as path:
                records.write_shard(path, itertools.islice(stream, length))
    counts = {split: uses.tolist() for split, uses in counts.items()}
    identity = teachers.fingerprint(teacher), metadata["fingerprint"]
    info = CodesInfo(NAME, books, size, HOP_LENGTH, *identity, counts, shards)
    for name, rows in ((TRACKS, manifest), (INFO, [info._asdict()])):
        with atomic_write(os.path.join(root, name), replace=True) as path:
            pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(os.path.join(root, ".staging"))
    for name in set(os.listdir(root)) - {INFO, TRACKS, *itertools.chain(*shards.values())}:
        os.unlink(os.path.join(root, name))
    return info
