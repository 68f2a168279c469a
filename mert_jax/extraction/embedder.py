"""Hidden states of recordings of any length, by a checkpoint of any kind.

The result of a recording does not depend on the rest of its batch or on its padding: the first
group norm is that of the whole recording (`group_norm`), and attention leaves out padding.
Shapes: B clips, N samples, T frames, D width, L layers.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import soxr
from flax import linen as nn
from jax.sharding import NamedSharding

from mert_jax import sharding
from mert_jax.checkpoints import in_memory
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.extraction import chunking
from mert_jax.extraction.chunking import Segment
from mert_jax.extraction.group_norm import Moments
from mert_jax.models.mert_v1 import hidden_states
from mert_jax.tensors import state_dict

WAITING = 64  # segments that may overtake one that waits for others of its length
BLOCK = 1 << 20  # samples of a wave that are converted to float64 at a time


class EmbeddingSettings(NamedTuple):
    """Settings of an embedding: the cutting of recordings and the hidden states that are kept.

    layers: 0 is the encoder's input, () means all. pool: "none", or "mean" over time. chunk:
    seconds embedded at once; longer recordings are cut into such chunks, each frame with `context`
    seconds on both sides. window: seconds of clips that count as separate recordings, 0 for none.
    batch: seconds of audio on a device at a time.
    """

    layers: tuple[int, ...] = ()
    pool: str = "none"
    chunk: float = 60.0
    context: float = 2.0
    window: float = 0.0
    batch: float = 60.0


class Model:
    """A student for inference, as `mert_jax.load` returns it; call it with waves.

    sample_rate: Hz of the audio it hears. frame_rate: frames a second. num_layers: L.
    """

    def __init__(self, checkpoint: in_memory.Checkpoint):
        body = in_memory.without_heads(checkpoint)
        self.student, self.params, self.about = body.student, body.params, body.about
        self.sample_rate = self.about.sample_rate
        self.frame_rate = self.sample_rate / self.student.hop_length
        self.num_layers = self.student.num_layers
        self._embedders: dict[EmbeddingSettings, Embedder] = {}  # with their compiled programs

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and of the settings that change the hidden states."""
        settings = (self.sample_rate, self.about.do_normalize, self.student.num_heads)
        return state_dict.fingerprint((self.params, *map(np.asarray, settings)))

    def reinitialised(self, seed: int) -> "Model":
        """Return the same student with new random weights."""
        wave = jnp.zeros((1, self.student.receptive_field))
        variables = jax.jit(self.student.init)(jax.random.key(seed), wave)
        params = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
        return Model(in_memory.Checkpoint(self.student, params, None, 0, self.about))

    def __call__(self, wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
        """Return hidden states f32 [L + 1, T, D] of a wave f32 [N], [L + 1, B, T, D] of [B, N].

        First the encoder's input, then every layer's output, the last one after the final norm if
        there is one. Waves are in [-1, 1] at `sample_rate`. Raises UserError for another shape, and
        for a wave that is too short or not finite.
        """
        wave = np.asarray(wave, np.float32)
        if wave.ndim not in (1, 2):
            raise UserError(f"wave is {wave.shape}, not [N] or [B, N]; average its channels first")
        if sample_rate != self.sample_rate:
            wave = soxr.resample(wave.T, sample_rate, self.sample_rate, "HQ").T
        states = list(self.embed(np.atleast_2d(wave)))
        return np.stack(states, 1) if wave.ndim == 2 else states[0]

    def embed(self, waves: Iterable[np.ndarray], **settings: Any) -> Iterator[np.ndarray]:
        """Yield hidden states f32 [layers, T, D] of each wave f32 [N], in order.

        Waves have the model's own rate; keywords are fields of EmbeddingSettings; `pool="mean"`
        gives [layers, D]. Raises UserError for a wave that is too short or not finite, and as
        `Embedder` does.
        """
        chosen = EmbeddingSettings(**settings)
        if chosen not in self._embedders:
            self._embedders[chosen] = Embedder(self, chosen)
        embedder = self._embedders[chosen]
        results: list[_Result] = []

        def segments() -> Iterator[Segment]:
            for number, wave in enumerate(waves):
                if not np.isfinite(wave).all():
                    raise UserError(f"wave {number} has values that are not finite")
                moments = embedder.chunker.moments()
                for start in range(0, len(wave), BLOCK):
                    moments.add(wave[start : start + BLOCK])
                frames = len(embedder.chunker.times(moments.samples))
                if not frames:
                    shortest = self.student.receptive_field
                    raise UserError(
                        f"wave {number} has {len(wave)} samples; a frame needs {shortest}"
                    )
                results.append(_Result(frames, chosen.pool))
                yield from embedder.chunker.segments([wave], moments, number)

        done = 0
        for segment, states in embedder.run(segments()):
            results[segment.recording_id].add(segment, states)
            while done < len(results) and not results[done].missing:
                yield results[done].states
                results[done].states = None
                done += 1


class _Result:
    """The hidden states of a recording, [layers, frames, D] or their mean, as segments arrive."""

    def __init__(self, frames: int, pool: str):
        self.frames, self.missing, self.mean = frames, frames, pool == "mean"
        self.states: Any = None

    def add(self, segment: Segment, states: np.ndarray) -> None:
        count = segment.last - segment.first
        if self.states is None:
            shape = states.shape if self.mean else (len(states), self.frames, states.shape[-1])
            self.states = np.zeros(shape, np.float32)
        if self.mean:
            self.states += states / np.float32(self.frames)
        else:
            self.states[:, segment.at : segment.at + count] = states
        self.missing -= count


class Embedder:
    """Runs a model over segments of recordings, on all devices of this process.

    layers: the hidden states that it returns. chunker: cuts recordings. Raises UserError for
    settings that contradict each other or the model.
    """

    def __init__(self, model: Model, settings: EmbeddingSettings):
        student, rate = model.student, model.frame_rate
        if settings.pool not in ("none", "mean"):
            raise UserError(f"pool is {settings.pool!r}, not none or mean")
        self.model, self.settings = model, settings
        self.layers = layers = settings.layers or tuple(range(model.num_layers + 1))
        if wrong := [i for i in layers if not 0 <= i <= model.num_layers]:
            raise UserError(f"layer {wrong[0]} of a model with 0 (its input) to {model.num_layers}")
        chunk, context = round(settings.chunk * rate), round(settings.context * rate)
        if not 0 <= 2 * context < chunk:
            raise UserError(
                f"chunks of {settings.chunk:g} s have no room for {settings.context:g} s of "
                "context on both sides; make them longer, or the context shorter"
            )
        window = round(settings.window * model.sample_rate)
        if window and window < student.receptive_field:
            raise UserError(f"windows of {window} samples; a frame needs {student.receptive_field}")
        front = model.params["feature_encoder"]
        kernel, norm = np.asarray(front["conv_layers_0"]["kernel"])[:, 0], front["layer_norm"]
        scale, bias = np.asarray(norm["scale"]), np.asarray(norm["bias"])
        self.chunker = chunking.Chunker(
            *(student.hop_length, student.receptive_field, chunk, context, window),
            moments=lambda: Moments(len(kernel), student.conv_strides[0]),
            norm=lambda moments: moments.norm(kernel, scale, bias, model.about.do_normalize),
        )
        self._mesh = sharding.make_mesh(-1, 1, 1, jax.local_devices())
        # layers above the highest requested one are not computed; the last hidden state of a
        # pre-norm student comes after the final norm, which the ones below lack
        depth = min(max(layers) + student.pre_norm, model.num_layers)
        self._student = student.clone(num_layers=depth)
        encoder = model.params["encoder"]
        lower = jax.tree.map(lambda x: x[:depth], encoder["layers"])
        params = model.params | {"encoder": encoder | {"layers": lower}}
        self._params = sharding.placed(params, sharding.replicated(self._mesh))
        self._forward = jax.jit(self._states)

    def _states(self, params, wave, frames, ranges, center, factor, shift):
        wave = (wave - center[:, :1]) * center[:, 1:]
        number = jnp.arange(self.chunker.num_frames(wave.shape[1]))[None]
        padding = number >= frames[:, None]
        states = hidden_states(self._student, params, wave, padding, (factor, shift))
        states = states[np.array(self.layers)]
        if self.settings.pool == "none":
            return states
        weight = (number >= ranges[:, :1]) & (number < ranges[:, 1:])
        return jnp.einsum("lbtd,bt->lbd", states, weight.astype(states.dtype))

    def run(self, segments: Iterable[Segment]) -> Iterator[tuple[Segment, np.ndarray]]:
        """Yield segments with the hidden states of their kept frames, f32 [layers, frames, D].

        With `pool="mean"`, their sum [layers, D]. The order differs from that of `segments`, as
        those of one length are batched.
        """
        devices, batch_frames = self._mesh.size, self.settings.batch * self.model.frame_rate

        # powers of two, so that smaller batches have few sizes, each of which is compiled once
        def batch_size(frames: int) -> int:
            return devices << max(int(math.log2(batch_frames / frames)), 0)

        def length(segment: Segment) -> int:
            return chunking.bucket(segment.frames)

        previous = None
        for frames, group in chunking.batches(segments, length, batch_size, WAITING):
            while group:
                rows = devices << int(math.log2(max(len(group) / devices, 1)))
                rows = min(batch_size(frames), rows)
                batch, group = group[:rows], group[rows:]
                states = self._dispatch(batch, frames, rows)
                if previous:  # while the devices compute the next ones
                    yield from self._split(*previous)
                previous = batch, states
        if previous:
            yield from self._split(*previous)

    def _dispatch(self, batch: list[Segment], frames: int, rows: int) -> jax.Array:
        wave = np.zeros((rows, self.chunker.num_samples(frames)), np.float32)
        for i, segment in enumerate(batch):
            wave[i, : len(segment.wave)] = segment.wave
        padded = [*batch, *[batch[0]] * (rows - len(batch))]
        inputs = [
            wave,
            np.array([segment.frames for segment in padded]),
            np.array([(segment.first, segment.last) for segment in padded]),
            np.array([(segment.norm.mean, segment.norm.scale) for segment in padded], np.float32),
            np.stack([segment.norm.factor for segment in padded]),
            np.stack([segment.norm.shift for segment in padded]),
        ]
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("highest"):
            inputs = jax.device_put(inputs, NamedSharding(self._mesh, sharding.BATCH))
            return self._forward(self._params, *inputs)

    def _split(
        self, batch: list[Segment], states: jax.Array
    ) -> Iterator[tuple[Segment, np.ndarray]]:
        states = np.asarray(states)
        for i, x in enumerate(batch):
            yield x, states[:, i] if states.ndim == 3 else states[:, i, x.first : x.last]


def load(path: str) -> Model:
    """Return the model of a workdir, a Hugging Face directory or a fairseq file.

    Raises UserError as `read_checkpoint` does.
    """
    return Model(read_checkpoint(path, moments=False))
