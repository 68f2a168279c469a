"""Resumable cache of features on disk, keyed by checkpoint and clips.

Shapes: n clips, L layers, T frames, D width, N samples.
"""

import collections
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax import files
from mert_jax.constants import FULL_SCALE
from mert_jax.data import decoding
from mert_jax.errors import UserError
from mert_jax.probing import waves
from mert_jax.probing.features import Features
from mert_jax.tasks.task import Clip

SHARD = 64  # clips in a file of pooled features, and those that a stopped run may lose
Tick = Callable[[int], Any]  # receives the number of clips done
Skipped = dict[str, Any]  # of a clip that cannot be read: path, start, reason, detail


class Pooled(NamedTuple):
    """Features f32 [n, L, D] of the readable clips, those clips, and the skipped ones."""

    x: np.ndarray
    clips: list[Clip]
    left_out: list[Skipped]


class Frames(NamedTuple):
    """Features of single frames, in files whose `paths` lack their suffix, one for each clip."""

    paths: list[str]
    clips: list[Clip]
    left_out: list[Skipped]
    sample_rate: int
    frame_rate: float

    def features(self, i: int) -> np.ndarray:
        """Return the features float16 [L, T, D] of clip i, memory-mapped."""
        return np.load(f"{self.paths[i]}.npy", mmap_mode="r")

    def waves(self, i: int) -> np.ndarray:
        """Return the mixture and its sources, f32 [1 + sources, N], of a clip with sources."""
        return np.load(f"{self.paths[i]}.waves.npy").astype(np.float32) / FULL_SCALE


def key(features: Features, clips: Sequence[Clip], kind: str) -> str:
    """Return a name that changes with the features, the clips and their files, not with labels."""
    about = (kind, features.name, features.fingerprint, features.layers, features.numbers)
    about = repr((*about, features.sample_rate, features.frame_rate))
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    for clip in clips:
        sources = clip.label.values() if isinstance(clip.label, dict) else ()
        for path in (clip.path, *sources):
            status = os.stat(path) if os.path.exists(path) else None
            state = (status.st_size, status.st_mtime_ns) if status else (-1, -1)
            entry = (os.path.abspath(path), clip.start, clip.seconds, *state)
            digest.update(repr(entry).encode(errors="surrogateescape"))
    return f"{features.name}-{kind}-{digest.hexdigest()}"


def _sound(
    clips: Sequence[Clip], sample_rate: int, read: MutableSequence, skipped: MutableSequence
) -> Iterator[np.ndarray]:
    """Yield the wave f32 [N] of each readable clip, cut to its shortest source.

    Before, append its number and, if it has sources, its wave and theirs to `read`; append the
    number and description of other clips to `skipped`.
    """
    sources = [list(clips)]
    if clips and isinstance(clips[0].label, dict):
        sources += [[c._replace(path=c.label[stem]) for c in clips] for stem in clips[0].label]
    for rows in zip(*(waves.read(source, sample_rate) for source in sources), strict=True):
        (i, *_), tracks = zip(*rows, strict=True)
        if errors := [wave for wave in tracks if isinstance(wave, decoding.SkippedFile)]:
            about = dict(path=clips[i].path, start=clips[i].start)
            skipped.append((i, about | dict(reason=errors[0].reason, detail=errors[0].detail)))
        else:
            size = min(map(len, tracks))
            tracks = [wave[:size] for wave in tracks]
            read.append((i, tracks if len(tracks) > 1 else []))
            yield tracks[0]


def save(path: str, x: np.ndarray) -> None:
    """Write an array to the new file `path`, whole or not at all."""
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, x)


def pooled(root: str, features: Features, clips: Sequence[Clip], tick: Tick) -> Pooled:
    """Return features averaged over time, cached in `root`."""
    folder = os.path.join(root, key(features, clips, "pooled"))
    parts, readable, left_out = [], [], []
    for start in range(0, len(clips), SHARD):
        path, part = os.path.join(folder, f"{start:08d}.npz"), clips[start : start + SHARD]
        if not os.path.exists(path):
            _write_shard(path, features, part)
        with np.load(path) as stored:
            parts.append(stored["x"])
            readable += [part[i] for i in stored["index"]]
            left_out += json.loads(str(stored["left_out"]))
        tick(len(part))
    # shards without a readable clip do not know the width
    return Pooled(np.concatenate([x for x in parts if len(x)] or parts), readable, left_out)


def _write_shard(path: str, features: Features, clips: Sequence[Clip]) -> None:
    read, skipped = [], []
    sound = _sound(clips, features.sample_rate, read, skipped)
    rows = [np.asarray(row, np.float32) for row in features.pooled(sound)]
    x = np.stack(rows) if rows else np.zeros((0, features.layers, 1), np.float32)
    if not np.isfinite(x).all():
        raise UserError(f"{features.name} has features that are not finite; check the checkpoint")
    index, left_out = np.array([i for i, _ in read], int), [row for _, row in skipped]
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, x=x, index=index, left_out=json.dumps(left_out))


def frames(root: str, features: Features, clips: Sequence[Clip], tick: Tick) -> Frames:
    """Return features of single frames, cached in `root`, with the waves of clips with sources.

    Raises UserError if the disk has no room for all of them.
    """
    folder = os.path.join(root, key(features, clips, "frames"))
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f"{i:08d}") for i in range(len(clips))]

    def with_suffix(suffix: str) -> list[int]:
        return [i for i, path in enumerate(paths) if os.path.exists(path + suffix)]

    todo = sorted(set(range(len(clips))) - set(with_suffix(".npy") + with_suffix(".json")))
    tick(len(clips) - len(todo))
    read, skipped = collections.deque(), []
    sound = _sound([clips[i] for i in todo], features.sample_rate, read, skipped)
    for number, x in enumerate(features.frames(sound)):
        (i, tracks), x = read.popleft(), np.asarray(x, np.float16)
        if not np.isfinite(x).all():
            raise UserError(f"{features.name} has features beyond float16; check the checkpoint")
        stored = decoding.to_int16(np.stack(tracks))[0] if tracks else np.zeros(0)
        size, free = (x.nbytes + stored.nbytes) * len(todo), shutil.disk_usage(folder).free
        if number == 0 and size > free:
            need = f"frames of all layers need {size / 1e9:.1f} GB in {folder}"
            way_out = "fewer layers need less: --layers=7, say"
            raise UserError(f"{need}, which has {free / 1e9:.1f} GB free; {way_out}")
        if tracks:
            save(f"{paths[todo[i]]}.waves.npy", stored)
        save(f"{paths[todo[i]]}.npy", x)  # written last: it marks the clip as done
        tick(1)
    for i, row in skipped:
        target = f"{paths[todo[i]]}.json"
        with files.atomic_write(target) as temporary, open(temporary, "w") as file:
            json.dump(row, file)
        tick(1)
    names = [f"{paths[i]}.json" for i in with_suffix(".json")]
    left_out = [json.loads(pathlib.Path(name).read_text()) for name in names]
    readable = with_suffix(".npy")
    paths, clips = [paths[i] for i in readable], [clips[i] for i in readable]
    return Frames(paths, clips, left_out, features.sample_rate, features.frame_rate)
