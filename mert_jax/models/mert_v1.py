"""The student: a convolutional front end and a BERT-style encoder over raw music.

Shapes: B clips, N samples, T frames, C conv channels, D width, H heads, L layers, K codebooks,
V codebook size, F feature bins. Names are Hugging Face's; numerics are the official fairseq code's
(yizhilll/MERT, `mert_fairseq/models/mert`, on fairseq's wav2vec 2.0 encoder).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import uniform

from mert_jax.kernels.attention import ATTENDED
from mert_jax.kernels.gelu import gelu
from mert_jax.kernels.numerics import full_precision
from mert_jax.models.feature_encoder import FeatureEncoder, receptive_field
from mert_jax.models.layers import Attention, Dropout, Norm, PosConvEmbed, dense, linear, logical

Array = jax.Array


class Head(NamedTuple):
    """Prediction of one teacher: K codebooks of `size` codes, or `size` features if K = 0."""

    name: str
    size: int
    num_codebooks: int = 0


class Output(NamedTuple):
    """The result of one forward pass."""

    last_hidden_state: Array  # [B, T, D]
    features_penalty: Array  # mean square of the conv features, scalar
    # by teacher: features [B, T, F] or (projections [B, T, K, d], codebooks [K, V, d])
    predictions: dict[str, Any]


def scale_gradient(x: Array, factor: float) -> Array:
    """Return `x`, with its gradient multiplied by `factor` (fairseq's GradMultiply)."""
    if factor == 1.0:
        return x
    frozen = jax.lax.stop_gradient(x)
    return frozen + factor * (x - frozen)


class FeatureProjection(nn.Module):
    """Norm, and projection to width D unless C = D and not `always`: [B, T, C] -> [B, T, D]."""

    width: int
    always: bool
    dtype: Any

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = Norm(self.dtype, name="layer_norm")(features)
        self.sow("intermediates", "features_ln", x)
        if x.shape[-1] == self.width and not self.always:
            return x
        return linear(self.width, x.shape[-1], self.dtype, "projection")(x)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The fields of `Student` that the transformer needs; post-norm at 95M, pre-norm at 330M."""

    num_layers: int
    num_heads: int
    intermediate_size: int
    pre_norm: bool
    pos_conv_kernel: int
    pos_conv_groups: int
    hidden_dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    remat: str
    unroll: int
    dtype: Any


class EncoderLayer(nn.Module):
    """One transformer layer: [B, T, D] -> [B, T, D]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, padding: Array | None, deterministic: bool) -> tuple[Array, None]:
        config = self.config
        drop = Dropout(config.hidden_dropout)
        sizes = config.num_heads, config.attention_dropout, config.dtype
        attention = Attention(*sizes, name="attention")
        norm1 = Norm(config.dtype, name="layer_norm")
        norm2 = Norm(config.dtype, name="final_layer_norm")
        up = dense(config.intermediate_size, ("embed", "mlp"), config.dtype, "intermediate_dense")
        down = dense(x.shape[-1], ("mlp", "embed"), config.dtype, "output_dense")

        def feed_forward(y: Array) -> Array:
            return down(Dropout(config.activation_dropout)(gelu(up(y)), deterministic))

        if config.pre_norm:
            y = x + drop(attention(norm1(x), padding, deterministic), deterministic)
            y = y + drop(feed_forward(norm2(y)), deterministic)
        else:
            y = norm1(x + drop(attention(x, padding, deterministic), deterministic))
            y = norm2(y + drop(feed_forward(y), deterministic))
        if config.layerdrop and not deterministic:  # whole batch, no rescaling, as in fairseq
            keep = jax.random.uniform(self.make_rng("dropout")) > config.layerdrop
            y = jnp.where(keep, y, x)
        self.sow("intermediates", "hidden_states", y)
        return y, None


class Encoder(nn.Module):
    """Positional embedding and L layers, their parameters stacked: [B, T, D] -> [B, T, D]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array, padding: Array | None, deterministic: bool) -> Array:
        config = self.config
        if padding is not None:
            x = jnp.where(padding[..., None], 0, x)
        sizes = config.pos_conv_kernel, config.pos_conv_groups, config.dtype
        positions = PosConvEmbed(*sizes, name="pos_conv_embed")(x)
        self.sow("intermediates", "pos_conv_out", positions)
        norm = Norm(config.dtype, name="layer_norm")
        x = x + positions
        if not config.pre_norm:
            x = norm(x)
        x = Dropout(config.hidden_dropout)(x, deterministic)
        self.sow("intermediates", "encoder_input", x)
        layers = nn.scan(
            rematerialised(EncoderLayer, config.remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=config.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, name="layers")(x, padding, deterministic)
        return norm(x) if config.pre_norm else x


def rematerialised(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """Return `module` that recomputes nothing, all but products ("dots") or everything ("full")."""
    if policy == "none":
        return module
    keep = jax.checkpoint_policies
    # attention's result and sums are kept, so that its scores, T x T a head, need not be
    dots = keep.save_from_both_policies(keep.checkpoint_dots, keep.save_only_these_names(ATTENDED))
    saved = dots if policy == "dots" else None
    return nn.remat(module, policy=saved, prevent_cse=False, static_argnums=(3,))


class Student(nn.Module):
    """MERT: wave [B, N] -> hidden states [B, T, D] and a prediction for each teacher.

    `mask` and `padding` [B, T] are True at frames to hide and at frames that are padding.
    `num_frames` crops the conv features to the frames of the teachers; `norm` is the front end's
    group norm if it is known (`FeatureEncoder`). Activations are sown under "intermediates".
    """

    conv_dim: int
    conv_kernels: tuple[int, ...]
    conv_strides: tuple[int, ...]
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    pre_norm: bool
    heads: tuple[Head, ...] = ()
    final_dim: int = 64
    project_equal_widths: bool = False  # if C = D: True in Hugging Face, False in fairseq
    pos_conv_kernel: int = 128
    pos_conv_groups: int = 16
    feature_grad_mult: float = 1.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32

    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames of `num_samples` samples."""
        hop = self.hop_length
        return max(num_samples - self.receptive_field, -hop) // hop + 1

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_strides)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame depends on, and the fewest that give one."""
        return receptive_field(self.conv_kernels, self.conv_strides)

    def flops(self, num_samples: int) -> float:
        """Return the FLOPs of a forward pass of one clip; a training step costs 3 times as many.

        They are those of products alone, two a multiply-add.
        """
        frames, width, total, channels = num_samples, self.hidden_size, 0, 1
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            frames = (frames - kernel) // stride + 1
            total += frames * kernel * channels * self.conv_dim
            channels = self.conv_dim
        attention = 4 * width**2 + 2 * frames * width
        layer = attention + 2 * width * self.intermediate_size
        positions = width**2 // self.pos_conv_groups * self.pos_conv_kernel
        heads = 0
        for _, size, num_codebooks in self.heads:
            projected = num_codebooks * self.final_dim
            heads += projected * (width + size) if num_codebooks else width * size
        total += frames * (channels * width + positions + self.num_layers * layer + heads)
        return 2.0 * total

    @nn.compact
    def __call__(
        self,
        wave: Array,
        mask: Array | None = None,
        padding: Array | None = None,
        num_frames: int | None = None,
        deterministic: bool = True,
        norm: tuple[Array, Array] | None = None,
    ) -> Output:
        if wave.ndim != 2:  # channels would be taken for clips
            raise ValueError(f"wave is {wave.shape}, not [B, N]; average its channels first")
        full = full_precision(self.dtype)
        kernels, strides, dtype = self.conv_kernels, self.conv_strides, self.dtype
        encoder = FeatureEncoder(self.conv_dim, kernels, strides, dtype, name="feature_encoder")
        features = encoder(wave, norm)
        features = scale_gradient(features, self.feature_grad_mult)[:, :num_frames]
        features_penalty = jnp.mean(jnp.square(features.astype(full)))
        self.sow("intermediates", "conv_features", features)

        width, always = self.hidden_size, self.project_equal_widths
        x = FeatureProjection(width, always, dtype, name="feature_projection")(features)
        self.sow("intermediates", "features_proj", x)
        x = Dropout(self.input_dropout)(x, deterministic)
        embed = self.param("masked_spec_embed", uniform(1.0), (width,))
        if mask is not None:
            x = jnp.where(mask[..., None], embed.astype(dtype)[None, None, :], x)
        self.sow("intermediates", "masked_input", x)

        names = (field.name for field in dataclasses.fields(EncoderConfig))
        config = EncoderConfig(**{name: getattr(self, name) for name in names})
        x = Encoder(config, name="encoder")(x, padding, deterministic)
        predictions = {head.name: self._predict(head, x.astype(full)) for head in self.heads}
        return Output(x, features_penalty, predictions)

    def _predict(self, head: Head, x: Array) -> Any:
        books, width = head.num_codebooks, self.final_dim
        size = books * width or head.size
        proj = linear(size, self.hidden_size, x.dtype, f"{head.name}_proj")(x)
        if not books:
            return proj
        init = logical(uniform(1.0), None, "vocab", None)
        codebooks = self.param(f"{head.name}_codebooks", init, (books, head.size, width))
        return proj.reshape(*x.shape[:2], books, width), codebooks


def hidden_states(
    student: Student, params: Any, wave: Array, padding: Array | None = None, norm: Any = None
) -> Array:
    """Return the encoder's input and every layer's output, [L + 1, B, T, D].

    The last one is after the final norm of a pre-norm encoder. Arguments are those of `Student`.
    """
    output, variables = student.apply(
        {"params": params}, wave, padding=padding, norm=norm, mutable=["intermediates"]
    )
    encoder = variables["intermediates"]["encoder"]
    layers = encoder["layers"]["hidden_states"][0][:-1]
    first, last = encoder["encoder_input"][0], output.last_hidden_state
    return jnp.concatenate([first[None], layers, last[None]])
