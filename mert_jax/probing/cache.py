"""Resumable cache of features on disk, keyed by checkpoint and clips.

Shapes: n clips, L layers, T frames, D width, N samples.
"""

import collections
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax import files
from mert_jax.constants import FULL_SCALE
from mert_jax.data.decoding import SkippedFile
from mert_jax.errors import UserError
from mert_jax.probing import waves
from mert_jax.probing.features import Features
from mert_jax.tasks.task import Clip

SHARD = 64  # clips in a file of pooled features, and those that a stopped run may lose
Skipped = dict[str, str]  # a clip that could not be read: path, start, reason, detail


class Pooled(NamedTuple):
    """Features f32 [n, L, D] of the readable clips, those clips, and the skipped ones."""

    x: np.ndarray
    clips: list[Clip]
    left_out: list[Skipped]


class Frames(NamedTuple):
    """Features of single frames, one file float16 [L, T, D] for each clip.

    `folder` has the files under the names `stems` and, for clips with sources, the waves int16
    [1 + sources, N] beside them.
    """

    folder: str
    stems: list[str]
    clips: list[Clip]
    left_out: list[Skipped]
    sample_rate: int
    frame_rate: float

    def features(self, i: int) -> np.ndarray:
        """Return the features float16 [L, T, D] of clip i, memory-mapped."""
        return np.load(os.path.join(self.folder, f"{self.stems[i]}.npy"), mmap_mode="r")

    def waves(self, i: int) -> np.ndarray:
        """Return the mixture and its sources, f32 [1 + sources, N]."""
        stored = np.load(os.path.join(self.folder, f"{self.stems[i]}.waves.npy"))
        return stored.astype(np.float32) / FULL_SCALE


def key(features: Features, clips: Sequence[Clip], kind: str) -> str:
    """Return a name that changes with the features, the clips and their files, not with labels."""
    digest = hashlib.blake2b(digest_size=8)
    about = (kind, features.name, features.fingerprint, features.layers, features.numbers)
    digest.update(repr((*about, features.sample_rate, features.frame_rate)).encode())
    states: dict[str, tuple[int, int]] = {}
    for clip in clips:
        for path in (clip.path, *_sources(clip)):
            if path not in states:
                states[path] = _state(path)
            entry = (os.path.abspath(path), clip.start, clip.seconds, *states[path])
            digest.update(repr(entry).encode(errors="surrogateescape"))
    return f"{features.name}-{kind}-{digest.hexdigest()}"


def _sources(clip: Clip) -> list[str]:
    return list(clip.label.values()) if isinstance(clip.label, dict) else []


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _skipped(clip: Clip, e: SkippedFile) -> Skipped:
    return dict(path=clip.path, start=clip.start, reason=e.reason, detail=e.detail)


def pooled(
    root: str, features: Features, clips: Sequence[Clip], tick: Callable[[int], Any]
) -> Pooled:
    """Return features averaged over time, cached in `root`; `tick` receives clips done."""
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
    parts = [x for x in parts if len(x)]
    x = np.concatenate(parts) if parts else np.zeros((0, features.layers, 1), np.float32)
    return Pooled(x, readable, left_out)


def _write_shard(path: str, features: Features, clips: Sequence[Clip]) -> None:
    index, left_out = [], []

    def sound() -> Iterator[np.ndarray]:
        for i, wave in waves.read(clips, features.sample_rate):
            if isinstance(wave, SkippedFile):
                left_out.append(_skipped(clips[i], wave))
            else:
                index.append(i)
                yield wave

    x = [np.asarray(row, np.float32) for row in features.pooled(sound())]
    if any(not np.isfinite(row).all() for row in x):
        raise UserError(f"{features.name} has features that are not finite; check the checkpoint")
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        x = np.stack(x) if x else np.zeros((0, features.layers, 1), np.float32)
        np.savez(file, x=x, index=np.array(index, int), left_out=json.dumps(left_out))


def frames(
    root: str, features: Features, clips: Sequence[Clip], tick: Callable[[int], Any]
) -> Frames:
    """Return features of single frames, cached in `root`, with the waves of clips with sources.

    Raises UserError if the disk has no room for all of them.
    """
    folder = os.path.join(root, key(features, clips, "frames"))
    os.makedirs(folder, exist_ok=True)
    names = [f"{i:08d}" for i in range(len(clips))]

    def at(i: int, suffix: str) -> str:
        return os.path.join(folder, names[i] + suffix)

    todo = [
        i
        for i in range(len(clips))
        if not (os.path.exists(at(i, ".npy")) or os.path.exists(at(i, ".json")))
    ]
    tick(len(clips) - len(todo))
    waiting: collections.deque[tuple[int, np.ndarray]] = collections.deque()

    def sound() -> Iterator[np.ndarray]:
        for i, tracks in _together([clips[i] for i in todo], features.sample_rate):
            if isinstance(tracks, SkippedFile):
                with files.atomic_write(at(todo[i], ".json")) as path, open(path, "w") as file:
                    json.dump(_skipped(clips[todo[i]], tracks), file)
                tick(1)
            else:
                waiting.append((todo[i], tracks))
                yield tracks[0]

    stream = features.stream or functools.partial(map, features.frames)
    checked = False
    for x in stream(sound()):
        (i, tracks), x = waiting.popleft(), np.asarray(x, np.float16)
        if not np.isfinite(x).all():
            raise UserError(f"{features.name} has features that float16 cannot hold")
        if not checked:
            _check_room(folder, x.nbytes + (2 * tracks.size if len(tracks) > 1 else 0), len(todo))
            checked = True
        if len(tracks) > 1:
            _save(at(i, ".waves.npy"), _int16(tracks))
        _save(at(i, ".npy"), x)  # written last: it marks the clip as done
        tick(1)
    readable = [i for i in range(len(clips)) if os.path.exists(at(i, ".npy"))]
    left_out = []
    for i in sorted(set(range(len(clips))) - set(readable)):
        with open(at(i, ".json")) as file:
            left_out.append(json.load(file))
    stems, clips = [names[i] for i in readable], [clips[i] for i in readable]
    return Frames(folder, stems, clips, left_out, features.sample_rate, features.frame_rate)


def _together(
    clips: Sequence[Clip], sample_rate: int
) -> Iterator[tuple[int, np.ndarray | SkippedFile]]:
    """Yield each clip's wave and its sources, f32 [1 + sources, N], cut to the shortest."""
    sources = [list(clips)]
    if clips and isinstance(clips[0].label, dict):
        stems = list(clips[0].label)
        sources += [[clip._replace(path=clip.label[stem]) for clip in clips] for stem in stems]
    for rows in zip(*(waves.read(source, sample_rate) for source in sources), strict=True):
        tracks = [wave for _, wave in rows]
        if wrong := [wave for wave in tracks if isinstance(wave, SkippedFile)]:
            yield rows[0][0], wrong[0]
        else:
            size = min(len(wave) for wave in tracks)
            yield rows[0][0], np.stack([wave[:size] for wave in tracks])


def _int16(tracks: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(tracks * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def _save(path: str, x: np.ndarray) -> None:
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, x)


def _check_room(folder: str, each: int, count: int) -> None:
    free = shutil.disk_usage(folder).free
    if each * count > free:
        raise UserError(
            f"frames of all layers need {each * count / 1e9:.1f} GB in {folder}, which has "
            f"{free / 1e9:.1f} GB free; fewer layers need less: --layers=7, say"
        )
