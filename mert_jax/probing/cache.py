"""Features on disk: computed once for each checkpoint and list of clips, and gone on with.

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

SHARD = 64  # clips a file of pooled features: what a stopped run may have to compute again
Said = dict[str, str]  # a clip that was left out: path, start, reason, detail


class Pooled(NamedTuple):
    """Features f32[n, L, D] of the clips that could be read, those clips, and the others."""

    x: np.ndarray
    clips: list[Clip]
    left_out: list[Said]


class Frames(NamedTuple):
    """As Pooled, with one file of features float16 [L, T, D] a clip; `folder` has them under the
    names `stems`, and beside them waves int16 [1 + sources, N] where the clips have sources."""

    folder: str
    stems: list[str]
    clips: list[Clip]
    left_out: list[Said]
    sample_rate: int
    frame_rate: float

    def features(self, i: int) -> np.ndarray:
        """float16 [L, T, D] of clip i, read when it is looked at."""
        return np.load(os.path.join(self.folder, f"{self.stems[i]}.npy"), mmap_mode="r")

    def waves(self, i: int) -> np.ndarray:
        """The mixture and its sources f32[1 + sources, N]."""
        stored = np.load(os.path.join(self.folder, f"{self.stems[i]}.waves.npy"))
        return stored.astype(np.float32) / FULL_SCALE


def key(features: Features, clips: Sequence[Clip], kind: str) -> str:
    """A name for these features of these clips: another checkpoint, a file that has changed or
    other clips of it have another name. Labels are no part of it."""
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
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _said(clip: Clip, e: SkippedFile) -> Said:
    return dict(path=clip.path, start=clip.start, reason=e.reason, detail=e.detail)


def pooled(
    root: str, features: Features, clips: Sequence[Clip], tick: Callable[[int], Any]
) -> Pooled:
    """Features averaged over time, from below `root` or computed; `tick` hears of clips done."""
    folder = os.path.join(root, key(features, clips, "pooled"))
    parts, kept, left_out = [], [], []
    for start in range(0, len(clips), SHARD):
        path, part = os.path.join(folder, f"{start:08d}.npz"), clips[start : start + SHARD]
        if not os.path.exists(path):
            _write_shard(path, features, part)
        with np.load(path) as stored:
            parts.append(stored["x"])
            kept += [part[i] for i in stored["index"]]
            left_out += json.loads(str(stored["left_out"]))
        tick(len(part))
    parts = [x for x in parts if len(x)]
    x = np.concatenate(parts) if parts else np.zeros((0, features.layers, 1), np.float32)
    return Pooled(x, kept, left_out)


def _write_shard(path: str, features: Features, clips: Sequence[Clip]) -> None:
    index, left_out = [], []

    def sound() -> Iterator[np.ndarray]:
        for i, wave in waves.read(clips, features.sample_rate):
            if isinstance(wave, SkippedFile):
                left_out.append(_said(clips[i], wave))
            else:
                index.append(i)
                yield wave

    x = [np.asarray(row, np.float32) for row in features.pooled(sound())]
    if any(not np.isfinite(row).all() for row in x):
        raise UserError(f"{features.name} has features that are not finite: is the model sound?")
    with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
        x = np.stack(x) if x else np.zeros((0, features.layers, 1), np.float32)
        np.savez(file, x=x, index=np.array(index, int), left_out=json.dumps(left_out))


def frames(
    root: str, features: Features, clips: Sequence[Clip], tick: Callable[[int], Any]
) -> Frames:
    """Features frame by frame, a file a clip, from below `root` or computed, and the waves of clips
    that have sources; UserError where the disk is too small for all of them."""
    folder = os.path.join(root, key(features, clips, "frames"))
    os.makedirs(folder, exist_ok=True)
    names = [f"{i:08d}" for i in range(len(clips))]
    at = lambda i, suffix: os.path.join(folder, names[i] + suffix)
    todo = [
        i
        for i in range(len(clips))
        if not (os.path.exists(at(i, ".npy")) or os.path.exists(at(i, ".json")))
    ]
    tick(len(clips) - len(todo))
    waiting: collections.deque[tuple[int, np.ndarray]] = collections.deque()

    def sound() -> Iterator[np.ndarray]:
        for i, found in _together([clips[i] for i in todo], features.sample_rate):
            if isinstance(found, SkippedFile):
                with files.atomic_write(at(todo[i], ".json")) as path, open(path, "w") as file:
                    json.dump(_said(clips[todo[i]], found), file)
                tick(1)
            else:
                waiting.append((todo[i], found))
                yield found[0]

    stream = features.stream or functools.partial(map, features.frames)
    checked = False
    for x in stream(sound()):
        (i, found), x = waiting.popleft(), np.asarray(x, np.float16)
        if not np.isfinite(x).all():
            raise UserError(f"{features.name} has features that float16 cannot hold")
        if not checked:
            _check_room(folder, x.nbytes + (2 * found.size if len(found) > 1 else 0), len(todo))
            checked = True
        if len(found) > 1:
            _save(at(i, ".waves.npy"), _int16(found))
        _save(at(i, ".npy"), x)  # the last one: a clip that has it is done
        tick(1)
    kept = [i for i in range(len(clips)) if os.path.exists(at(i, ".npy"))]
    left_out = []
    for i in sorted(set(range(len(clips))) - set(kept)):
        with open(at(i, ".json")) as file:
            left_out.append(json.load(file))
    of = lambda items: [items[i] for i in kept]
    rates = features.sample_rate, features.frame_rate
    return Frames(folder, of(names), of(clips), left_out, *rates)


def _together(
    clips: Sequence[Clip], sample_rate: int
) -> Iterator[tuple[int, np.ndarray | SkippedFile]]:
    """Each clip's wave and those of its sources, f32[1 + sources, N], as long as the shortest."""
    tracks = [list(clips)]
    if clips and isinstance(clips[0].label, dict):
        stems = list(clips[0].label)
        tracks += [[clip._replace(path=clip.label[stem]) for clip in clips] for stem in stems]
    for rows in zip(*(waves.read(track, sample_rate) for track in tracks), strict=True):
        found = [wave for _, wave in rows]
        if wrong := [wave for wave in found if isinstance(wave, SkippedFile)]:
            yield rows[0][0], wrong[0]
        else:
            size = min(len(wave) for wave in found)
            yield rows[0][0], np.stack([wave[:size] for wave in found])


def _int16(found: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(found * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


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
