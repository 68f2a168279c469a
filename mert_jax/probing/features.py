"""Frozen features that probes read: a student's hidden states, and what it has to be better than.

Shapes: N samples, L layers, T frames, F bins, D width.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax import teachers
from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.extraction import embedder
from mert_jax.models import spectrograms
from mert_jax.probing import musicnn
from mert_jax.tensors import state_dict

BASELINES = ("log_mel", "cqt", "random", "musicnn")
Stream = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


class Features(NamedTuple):
    """Frozen functions of waves f32 [N]."""

    name: str
    fingerprint: str  # identifies the features, with their name
    layers: int
    sample_rate: int
    frame_rate: float
    pooled: Stream  # means over time [L, D]
    frames: Stream  # [L, T, D] at `frame_rate`
    numbers: tuple[int, ...] = ()  # of the layers, if only some are computed


def student(model: Any, name: str = "student", layers: Sequence[int] = ()) -> Features:
    """Return all hidden states of an `embedder.Model`, or those of `layers`, 0 for its input."""
    layers = tuple(layers)
    pooled = functools.partial(model.embed, pool="mean", layers=layers)
    frames = functools.partial(model.embed, pool="none", layers=layers)
    about = (len(layers) or model.num_layers + 1, model.sample_rate, model.frame_rate)
    return Features(name, model.fingerprint, *about, pooled, frames, layers)


def log_mel() -> Features:
    """Return means and deviations of log-mel bands; frames come with their differences."""
    filters, hop = jnp.asarray(spectrograms.mel_filters(SAMPLE_RATE, 2048, 128)), HOP_LENGTH
    compute = jax.jit(lambda filters, wave: spectrograms.log_mel(wave[None], filters, hop)[0])
    return _baseline("log_mel", f"128 2048 {hop}", lambda wave: compute(filters, wave))


def cqt() -> Features:
    """Return features like `log_mel`'s of log(1 + CQT), the musical teacher's transform."""
    teacher = teachers.make("cqt")
    params = jax.tree.map(jnp.asarray, teacher.params)
    # params are an argument: large constants would become part of the program
    compute = jax.jit(lambda params, wave: jnp.log1p(teacher.apply(params, wave[None])[0]))
    return _baseline("cqt", teachers.fingerprint(teacher), lambda wave: compute(params, wave))


def tagger(path: str) -> Features:
    """Return musicnn's features, from its weights at `path`."""
    params, rate = musicnn.load(path), musicnn.SAMPLE_RATE
    pooled = functools.partial(map, lambda wave: musicnn.pooled(params, wave)[None])
    frames = functools.partial(map, lambda wave: musicnn.frames(params, wave)[None])
    fingerprint = state_dict.fingerprint(params)
    return Features("musicnn", fingerprint, 1, rate, rate / musicnn.HOP, pooled, frames)


def _baseline(name: str, about: str, spectrogram: Callable[[np.ndarray], Any]) -> Features:
    def bins(wave: np.ndarray) -> np.ndarray:
        # [T, F]; padding to whole seconds limits the number of compiled lengths
        padded = np.pad(wave, (0, -len(wave) % SAMPLE_RATE)).astype(np.float32)
        return np.asarray(spectrogram(padded))[: len(wave) // HOP_LENGTH + 1]

    def mean_and_std(wave: np.ndarray) -> np.ndarray:
        frames = bins(wave)
        return np.concatenate([frames.mean(0), frames.std(0)])[None]

    def with_difference(wave: np.ndarray) -> np.ndarray:
        frames = bins(wave)
        return np.concatenate([frames, np.diff(frames, axis=0, prepend=frames[:1])], 1)[None]

    fingerprint = hashlib.blake2b(f"{name} {about}".encode(), digest_size=8).hexdigest()
    streams = functools.partial(map, mean_and_std), functools.partial(map, with_difference)
    return Features(name, fingerprint, 1, SAMPLE_RATE, SAMPLE_RATE / HOP_LENGTH, *streams)


def make(
    checkpoint: str, baselines: Sequence[str], layers: Sequence[int] = (), musicnn_at: str = ""
) -> list[Features]:
    """Return the features of one table: the checkpoint's ("" for none), then the baselines'.

    "random" is the checkpoint's student with new weights.
    """
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise UserError(f"unknown baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")
    if "random" in baselines and not checkpoint:
        raise UserError("the baseline random is the student untrained: give its --checkpoint")
    if not checkpoint and not baselines:
        raise UserError("nothing to probe: give --checkpoint=PATH, --baselines=log_mel,cqt or both")
    if ("musicnn" in baselines) != bool(musicnn_at):
        both = "--baselines=musicnn and --musicnn=PATH need each other"
        raise UserError(f"{both}; {musicnn.WAY_OUT}")
    simple = {"log_mel": log_mel, "cqt": cqt, "musicnn": functools.partial(tagger, musicnn_at)}
    # first, because a wrong path shows at once
    others = [simple[name]() for name in baselines if name in simple]
    if not checkpoint:
        return others
    model = embedder.load(checkpoint)
    students = [student(model, layers=layers)]
    if "random" in baselines:
        students.append(student(model.reinitialised(0), "random", layers))
    return students + others
