"""Hidden states of recordings of any length, by a checkpoint of any kind.

What a recording gives does not depend on what shares its batch or on the length it is padded to:
its first group norm is that of the whole recording (`group_norm`), and nothing attends to padding.
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
from mert_jax.checkpoints.reading import read_checkpoint
from mert_jax.errors import UserError
from mert_jax.extraction import chunking
from mert_jax.extraction.chunking import Segment
from mert_jax.extraction.group_norm import Moments
from mert_jax.models.mert_v1 import hidden_states
from mert_jax.tensors import state_dict

WAITING = 64  # rows that may overtake one that waits for others of its length
BLOCK = 1 << 20  # samples of an array that are looked at in one go


class EmbeddingSettings(NamedTuple):
    """How recordings are cut and what is kept of them.

    layers: which hidden states, 0 being the encoder's input, () for all; pool: "none", or "mean"
    over time; chunk: seconds that are embedded in one piece; longer recordings are in chunks of as
    many, each frame with `context` seconds on both sides; window: seconds of clips that count as
    recordings of their own, 0 for none; batch: seconds of audio on a device at a time.
    """

    layers: tuple[int, ...] = ()
    pool: str = "none"
    chunk: float = 60.0
    context: float = 2.0
    window: float = 0.0
    batch: float = 60.0


class Model:
    """A student for inference, as `mert_jax.load` makes it; called with waves, see `__call__`.

    sample_rate: Hz that it hears; frame_rate: frames a second; num_layers: L.
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
        """Names the weights and what is heard with them."""
        used = (self.sample_rate, self.about.do_normalize, self.student.num_heads)
        return state_dict.fingerprint((self.params, *map(np.asarray, used)))

    def reinitialised(self, seed: int) -> "Model":
        """The same student before any training."""
        wave = jnp.zeros((1, self.student.receptive_field))
        variables = jax.jit(self.student.init)(jax.random.key(seed), wave)
        params = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
        return Model(in_memory.Checkpoint(self.student, params, None, 0, self.about))

    def __call__(self, wave: np.ndarray, sample_rate: int = 24_000) -> np.ndarray:
        """Hidden states f32 [L + 1, T, D] of a wave f32 [N] in [-1, 1] at `sample_rate`, or
        [L + 1, B, T, D] of [B, N]: the encoder's input, then every layer's output, the last one
        after the final norm where there is one.

        Raises UserError for another shape, and for a wave that is too short or not finite.
        """
        wave = np.asarray(wave, np.float32)
        if wave.ndim not in (1, 2):
            raise UserError(f"wave is {wave.shape}, not [N] or [B, N]; average its channels first")
        if sample_rate != self.sample_rate:
            wave = soxr.resample(wave.T, sample_rate, self.sample_rate, "HQ").T
        found = list(self.embed(wave if wave.ndim == 2 else wave[None]))
        return np.stack(found, 1) if wave.ndim == 2 else found[0]

    def embed(self, waves: Iterable[np.ndarray], **settings: Any) -> Iterator[np.ndarray]:
        """Hidden states f32 [layers, T, D] of each wave f32 [N], at the model's own rate, in their
        order; [layers, D] with `pool="mean"`. Keywords are those of `Settings`.

        Raises UserError for a wave that is too short for a frame or not finite, and as `Embedder`.
        """
        chosen = EmbeddingSettings(**settings)
        if chosen not in self._embedders:
            self._embedders[chosen] = Embedder(self, chosen)
        embedder = self._embedders[chosen]
        sums: list[Sum] = []

        def rows() -> Iterator[Segment]:
            for number, wave in enumerate(waves):
                if not np.isfinite(wave).all():
                    raise UserError(f"wave {number} has values that are not finite")
                moments = embedder.cutter.moments()
                for start in range(0, len(wave), BLOCK):
                    moments.add(wave[start : start + BLOCK])
                frames = len(embedder.cutter.times(moments.samples))
                if not frames:
                    fewest = self.student.receptive_field
                    raise UserError(f"wave {number} has {len(wave)} samples; {fewest} are a frame")
                sums.append(Sum(frames, chosen.pool))
                yield from embedder.cutter.rows([wave], moments, number)

        done = 0
        for row, states in embedder.run(rows()):
            sums[row.owner].add(row, states)
            while done < len(sums) and not sums[done].missing:
                yield sums[done].states
                sums[done].states = None
                done += 1


class Sum:
    """A recording's hidden states as its pieces come: [layers, frames, D], or their mean."""

    def __init__(self, frames: int, pool: str):
        self.frames, self.missing, self.mean = frames, frames, pool == "mean"
        self.states: Any = None

    def add(self, row: Segment, states: np.ndarray) -> None:
        """Take what `Embedder.run` gave for a piece."""
        kept = row.last - row.first
        if self.states is None:
            shape = states.shape if self.mean else (len(states), self.frames, states.shape[-1])
            self.states = np.zeros(shape, np.float32)
        if self.mean:
            self.states += states / np.float32(self.frames)
        else:
            self.states[:, row.at : row.at + kept] = states
        self.missing -= kept


class Embedder:
    """Runs a model over pieces of recordings, on all devices of this process.

    layers: the hidden states that it gives; cutter: makes the pieces. Raises UserError for settings
    that contradict each other or the model.
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
            raise UserError(f"windows of {window} samples; {student.receptive_field} are a frame")
        front = model.params["feature_encoder"]
        kernel, affine = np.asarray(front["conv_layers_0"]["kernel"])[:, 0], front["layer_norm"]
        affine = np.asarray(affine["scale"]), np.asarray(affine["bias"])
        self.cutter = chunking.Chunker(
            *(student.hop_length, student.receptive_field, chunk, context, window),
            moments=lambda: Moments(len(kernel), student.conv_strides[0]),
            norm=lambda moments: moments.norm(kernel, *affine, model.about.do_normalize),
        )
        self._mesh = sharding.make_mesh(-1, 1, 1, jax.local_devices())
        self._batch = settings.batch * rate
        # layers above the highest one wanted are not computed; a pre-norm student's last hidden
        # state is normed, those before are not
        depth = min(max(layers) + student.pre_norm, model.num_layers)
        self._student = student.clone(num_layers=depth)
        encoder = model.params["encoder"]
        lower = jax.tree.map(lambda x: x[:depth], encoder["layers"])
        params = model.params | {"encoder": encoder | {"layers": lower}}
        self._params = sharding.placed(params, sharding.replicated(self._mesh))
        self._forward = jax.jit(functools.partial(self._states, np.array(layers), settings.pool))

    def _states(self, layers, pool, params, wave, frames, kept, center, factor, shift):
        hop, field = self.cutter.hop, self.cutter.field
        length = (wave.shape[1] - field) // hop + 1
        wave = (wave - center[:, :1]) * center[:, 1:]
        number = jnp.arange(length)[None]
        padding = number >= frames[:, None]
        states = hidden_states(self._student, params, wave, padding, (factor, shift))[layers]
        if pool == "none":
            return states
        weight = (number >= kept[:, :1]) & (number < kept[:, 1:])
        return jnp.einsum("lbtd,bt->lbd", states, weight.astype(states.dtype))

    def run(self, rows: Iterable[Segment]) -> Iterator[tuple[Segment, np.ndarray]]:
        """Each row with its kept frames' hidden states f32 [layers, frames, D], or their sum
        [layers, D]; rows of one length go together, so that they come in another order."""
        devices = self._mesh.size
        # powers of two: what is left over is split into a few batches of sizes that come again
        size = lambda frames: devices << max(int(math.log2(self._batch / frames)), 0)
        key = lambda row: chunking.bucket(row.frames)
        before = None
        for frames, group in chunking.batches(rows, key, size, WAITING):
            while group:
                number = min(size(frames), devices << int(math.log2(max(len(group) / devices, 1))))
                batch, group = group[:number], group[number:]
                states = self._dispatch(batch, frames, number)
                if before:  # while the devices work on the next ones
                    yield from self._split(*before)
                before = batch, states
        if before:
            yield from self._split(*before)

    def _dispatch(self, batch: list[Segment], frames: int, number: int) -> jax.Array:
        wave = np.zeros((number, (frames - 1) * self.cutter.hop + self.cutter.field), np.float32)
        for i, row in enumerate(batch):
            wave[i, : len(row.wave)] = row.wave
        rows = [*batch, *[batch[0]] * (number - len(batch))]
        inputs = [
            wave,
            np.array([row.frames for row in rows]),
            np.array([(row.first, row.last) for row in rows]),
            np.array([(row.norm.mean, row.norm.scale) for row in rows], np.float32),
            np.stack([row.norm.factor for row in rows]),
            np.stack([row.norm.shift for row in rows]),
        ]
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("highest"):
            inputs = jax.device_put(inputs, NamedSharding(self._mesh, sharding.BATCH))
            return self._forward(self._params, *inputs)

    def _split(
        self, batch: list[Segment], states: jax.Array
    ) -> Iterator[tuple[Segment, np.ndarray]]:
        states = np.asarray(states)
        for i, row in enumerate(batch):
            yield row, states[:, i] if states.ndim == 3 else states[:, i, row.first : row.last]


def load(path: str) -> Model:
    """The model of a checkpoint: a workdir of ours, a Hugging Face directory, a fairseq file.

    Raises UserError as `formats.read` does.
    """
    return Model(read_checkpoint(path, moments=False))
