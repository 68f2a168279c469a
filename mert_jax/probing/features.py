"""Frozen features that probes read: a student's hidden states, and what it has to be better than.

Shapes: N samples, L layers, T frames, F bins, D width.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax import teachers
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.extraction import embedder
from mert_jax.models import spectrograms
from mert_jax.probing import musicnn
from mert_jax.tensors import state_dict

HOP = 320  # of the baselines, 75 frames a second as the student
BASELINES = ("log_mel", "cqt", "random", "musicnn")


class Features(NamedTuple):
    """A frozen function of waves.

    fingerprint: identifies the features, with their name
    layers: number of layers L
    pooled: iterator of waves f32 [N] -> iterator of means over time [L, D]
    frames: wave -> [L, T, D], at `frame_rate` Hz
    numbers: the layers' numbers, if only some are computed
    stream: `frames` of an iterator of waves, if that is faster
    """

    name: str
    fingerprint: str
    layers: int
    sample_rate: int
    frame_rate: float
    pooled: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]
    frames: Callable[[np.ndarray], np.ndarray]
    numbers: tuple[int, ...] = ()
    stream: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]] | None = None


def student(model: Any, name: str = "student", layers: Sequence[int] = ()) -> Features:
    """Return all hidden states of an `embedder.Model`, or those of `layers`.

    Layer 0 is the transformer's input. Raises UserError for a layer that the model does not have.
    """
    if wrong := [layer for layer in layers if not 0 <= layer <= model.num_layers]:
        raise UserError(
            f"layer {wrong[0]} is not one of the student's: it has 0 (before the transformer) to "
            f"{model.num_layers}"
        )
    chosen = tuple(layers)

    def stream(waves: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return model.embed(waves, pool="none", layers=chosen)

    return Features(
        name=name,
        fingerprint=model.fingerprint,
        layers=len(chosen) or model.num_layers + 1,
        sample_rate=model.sample_rate,
        frame_rate=model.frame_rate,
        pooled=lambda waves: model.embed(waves, pool="mean", layers=chosen),
        frames=lambda wave: next(iter(stream(iter([wave])))),
        numbers=chosen,
        stream=stream,
    )


def log_mel(n_mels: int = 128, n_fft: int = 2048) -> Features:
    """Return log-mel features: mean and standard deviation over time.

    Single frames come with their difference to the previous one, which shows onsets.
    """
    filters = jnp.asarray(spectrograms.mel_filters(SAMPLE_RATE, n_fft, n_mels))
    compute = jax.jit(lambda filters, wave: spectrograms.log_mel(wave[None], filters, HOP)[0])
    return _baseline("log_mel", f"{n_mels} {n_fft} {HOP}", lambda wave: compute(filters, wave))


def cqt() -> Features:
    """Return features like `log_mel`'s of log(1 + CQT), the musical teacher's transform."""
    teacher = teachers.make("cqt")
    params = jax.tree.map(jnp.asarray, teacher.params)
    # params are an argument: large constants would become part of the program
    compute = jax.jit(lambda params, wave: jnp.log1p(teacher.apply(params, wave[None])[0]))
    return _baseline("cqt", teachers.fingerprint(teacher), lambda wave: compute(params, wave))


def tagger(path: str) -> Features:
    """Return musicnn's features. Raises UserError unless `path` has its weights."""
    params = musicnn.load(path)
    return Features(
        name="musicnn",
        fingerprint=state_dict.fingerprint(params),
        layers=1,
        sample_rate=musicnn.SAMPLE_RATE,
        frame_rate=musicnn.SAMPLE_RATE / musicnn.HOP,
        pooled=lambda waves: (musicnn.pooled(params, wave)[None] for wave in waves),
        frames=lambda wave: musicnn.frames(params, wave)[None],
    )


def _baseline(name: str, about: str, spectrogram: Callable[[np.ndarray], Any]) -> Features:
    def bins(wave: np.ndarray) -> np.ndarray:
        """Return [T, F]; padding to whole seconds limits the number of compiled lengths."""
        padded = np.pad(wave, (0, -len(wave) % SAMPLE_RATE)).astype(np.float32)
        return np.asarray(spectrogram(padded))[: len(wave) // HOP + 1]

    def mean_and_std(wave: np.ndarray) -> np.ndarray:
        frames = bins(wave)
        return np.concatenate([frames.mean(0), frames.std(0)])[None]

    def with_difference(wave: np.ndarray) -> np.ndarray:
        frames = bins(wave)
        return np.concatenate([frames, np.diff(frames, axis=0, prepend=frames[:1])], 1)[None]

    return Features(
        name=name,
        fingerprint=hashlib.blake2b(f"{name} {about}".encode(), digest_size=8).hexdigest(),
        layers=1,
        sample_rate=SAMPLE_RATE,
        frame_rate=SAMPLE_RATE / HOP,
        pooled=lambda waves: map(mean_and_std, waves),
        frames=with_difference,
    )


def make(
    checkpoint: str,
    baselines: Sequence[str],
    seed: int = 0,
    layers: Sequence[int] = (),
    musicnn_at: str = "",
) -> list[Features]:
    """Return the features of one table: the checkpoint's ("" for none), then the baselines'.

    Raises UserError for an unknown baseline, "random" (the checkpoint's student with new weights)
    without a checkpoint, "musicnn" without its weights, and without any features.
    """
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise UserError(f"unknown baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")
    if "random" in baselines and not checkpoint:
        raise UserError("the baseline random is the checkpoint's student untrained: --checkpoint")
    if not checkpoint and not baselines:
        raise UserError("nothing to probe: give --checkpoint=PATH, --baselines=log_mel,cqt or both")
    if ("musicnn" in baselines) != bool(musicnn_at):
        raise UserError(
            f"--baselines=musicnn and --musicnn=PATH need each other; {musicnn.WAY_OUT}"
        )
    simple = {"log_mel": log_mel, "cqt": cqt, "musicnn": lambda: tagger(musicnn_at)}
    # first, because a wrong path shows at once
    others = [simple[name]() for name in baselines if name in simple]
    features = []
    if checkpoint:
        model = embedder.load(checkpoint)
        features.append(student(model, layers=layers))
        if "random" in baselines:
            features.append(student(model.reinitialised(seed), "random", layers))
    return features + others
