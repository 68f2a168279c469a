"""Hidden states of recordings of any length, by a checkpoint of any kind.

The result of a recording does not depend on the rest of its batch or on its padding: the first
group norm is that of the whole recording (`group_norm`), and attention leaves out padding.
Shapes: B clips, N samples, T frames, D width, L layers.
"""

import functools
import itertools
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
from mert_jax.extraction.chunking import Chunker, Segment, batches
from mert_jax.extraction.group_norm import Moments
from mert_jax.models.mert_v1 import hidden_states
from mert_jax.tensors import state_dict

WAITING = 64  # segments that may overtake one that waits for others of its length
BLOCK = 1 << 20  # samples of a wave that are converted to float64 at a time


class EmbeddingSettings(NamedTuple):
    """The cutting of recordings, in seconds, and the hidden states that are kept."""

    layers: tuple[int, ...] = ()  # 0 is the encoder's input, () means all
    pool: str = "none"  # or "mean" over time
    chunk: float = 60.0  # of longer recordings, embedded at once
    context: float = 2.0  # on both sides of each frame of a chunk
    window: float = 0.0  # clips that count as separate recordings, 0 for none
    batch: float = 60.0  # of audio on a device at a time


class Model:
    """A student for inference, as `mert_jax.load` returns it: call it with waves in [-1, 1]."""

    def __init__(self, checkpoint: in_memory.Checkpoint):
        body = in_memory.without_heads(checkpoint)
        self.student, self.params, self.about = body.student, body.params, body.about
        self.sample_rate = self.about.sample_rate
        self.frame_rate = self.sample_rate / self.student.hop_length
        self.num_layers = self.student.num_layers
        self._embedder = functools.cache(functools.partial(Embedder, self))  # with its programs

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
        there is one. Raises UserError for another shape, and as `embed` does.
        """
        wave = np.asarray(wave, np.float32)
        if wave.ndim not in (1, 2):
            raise UserError(f"wave is {wave.shape}, not [N] or [B, N]; average its channels first")
        if sample_rate != self.sample_rate:
            wave = soxr.resample(wave.T, sample_rate, self.sample_rate, "HQ").T
        states = list(self.embed(np.atleast_2d(wave)))
        return np.stack(states, 1) if wave.ndim == 2 else states[0]

    def embed(self, waves: Iterable[np.ndarray], **settings: Any) -> Iterator[np.ndarray]:
        """Yield hidden states f32 [layers, T, D] ([layers, D] for means) of each wave f32 [N].

        Waves have the model's own rate; keywords are fields of EmbeddingSettings. Raises UserError
        for a wave that is too short or not finite, and as `Embedder` does.
        """
        chosen = EmbeddingSettings(**settings)
        embedder, mean = self._embedder(chosen), chosen.pool == "mean"
        states, missing, done = {}, {}, 0  # by the wave's number
        for segment, part in embedder.run(self._segments(embedder.chunker, waves)):
            (number, length), count = segment.recording_id, segment.last - segment.first
            if number not in states:
                shape = part.shape if mean else (len(part), length, part.shape[-1])
                states[number], missing[number] = np.zeros(shape, np.float32), length
            if mean:
                states[number] += part / np.float32(length)
            else:
                states[number][:, segment.at : segment.at + count] = part
            missing[number] -= count
            while missing.get(done) == 0:
                yield states.pop(done)
                del missing[done]
                done += 1

    def _segments(self, chunker: Chunker, waves: Iterable[np.ndarray]) -> Iterator[Segment]:
        """Yield the segments of waves, identified by the wave's number and number of frames."""
        for number, wave in enumerate(waves):
            if not np.isfinite(wave).all():
                raise UserError(f"wave {number} has values that are not finite")
            if len(wave) < (shortest := self.student.receptive_field):
                raise UserError(f"wave {number} has {len(wave)} samples; a frame needs {shortest}")
            moments = chunker.moments()
            for start in range(0, len(wave), BLOCK):
                moments.add(wave[start : start + BLOCK])
            frames = len(chunker.times(len(wave)))
            yield from chunker.segments([wave], moments, (number, frames))


class Embedder:
    """Runs a model over segments that `chunker` cuts, on all devices; returns its `layers`.

    Raises UserError for settings that contradict each other or the model.
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
            lengths = f"chunks of {settings.chunk:g} s have no room for {settings.context:g} s"
            raise UserError(f"{lengths} of context on both sides; lengthen or shorten one of them")
        window = round(settings.window * model.sample_rate)
        if window and window < student.receptive_field:
            raise UserError(f"windows of {window} samples; a frame needs {student.receptive_field}")
        front = jax.tree.map(np.asarray, model.params["feature_encoder"])
        conv = front["conv_layers_0"]["kernel"][:, 0], student.conv_strides[0]
        affine = front["layer_norm"]["scale"], front["layer_norm"]["bias"]
        moments = functools.partial(Moments, *conv, *affine, model.about.do_normalize)
        sizes = student.hop_length, student.receptive_field, chunk, context, window
        self.chunker = Chunker(*sizes, moments)
        self._mesh = sharding.make_mesh(-1, 1, 1, jax.local_devices())
        # layers above the highest requested one are not computed; the last hidden state of a
        # pre-norm student comes after the final norm, which the ones below lack
        depth = min(max(layers) + student.pre_norm, model.num_layers)
        self._student = student.clone(num_layers=depth)
        encoder = model.params["encoder"]
        lower = {"layers": jax.tree.map(lambda x: x[:depth], encoder["layers"])}
        params = model.params | {"encoder": encoder | lower}
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
        """Yield segments, in another order, with kept states [layers, frames, D] or their sum."""
        # each batch once the next one is dispatched, so that the devices are never idle
        computed = itertools.chain(self._batches(segments), [None])
        for (batch, states), _ in itertools.pairwise(computed):
            states = np.asarray(states)
            for i, x in enumerate(batch):
                yield x, states[:, i] if states.ndim == 3 else states[:, i, x.first : x.last]

    def _batches(self, segments: Iterable[Segment]) -> Iterator[tuple[list[Segment], jax.Array]]:
        """Yield batches of segments with their hidden states in computation."""
        devices, batch_frames = self._mesh.size, self.settings.batch * self.model.frame_rate

        def rows_of(number: float) -> int:
            # powers of two a device, so that there are few sizes, each of which is compiled once
            return devices << max(int(math.log2(number)), 0)

        def batch_size(frames: int) -> int:
            return rows_of(batch_frames / frames)

        for frames, group in batches(segments, batch_size, WAITING):
            while group:
                rows = min(batch_size(frames), rows_of(len(group) / devices))
                batch, group = group[:rows], group[rows:]
                yield batch, self._dispatch(batch, frames, rows)

    def _dispatch(self, batch: list[Segment], frames: int, rows: int) -> jax.Array:
        wave = np.zeros((rows, self.chunker.num_samples(frames)), np.float32)
        for i, segment in enumerate(batch):
            wave[i, : len(segment.wave)] = segment.wave
        columns = [
            (x.frames, (x.first, x.last), np.float32(x.norm[:2]), x.norm.factor, x.norm.shift)
            for x in [*batch, *[batch[0]] * (rows - len(batch))]
        ]
        inputs = [wave, *map(np.stack, zip(*columns, strict=True))]
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("highest"):
            inputs = jax.device_put(inputs, NamedSharding(self._mesh, sharding.BATCH))
            return self._forward(self._params, *inputs)


def load(path: str) -> Model:
    """Return the model of a workdir, a Hugging Face directory or a fairseq file."""
    return Model(read_checkpoint(path, moments=False))
