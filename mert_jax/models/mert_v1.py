"""The student: a convolutional front end and a BERT-style encoder over raw music.

Shapes: B clips, N samples, T frames, C conv channels, D width, H heads, L layers, K codebooks,
V codebook size, F feature bins. Names are Hugging Face's; numerics are the official fairseq code's
(yizhilll/MERT, `mert_fairseq/models/mert`, on fairseq's wav2vec 2.0 encoder).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import uniform

from mert_jax.models.attention import ATTENDED, Attention
from mert_jax.models.feature_encoder import FeatureEncoder, receptive_field
from mert_jax.models.layers import (
    Dropout,
    Norm,
    encoder_init,
    full_precision,
    gelu,
    linear,
    logical,
)
from mert_jax.models.pos_conv_embed import PosConvEmbed

Array = jax.Array


def num_frames(num_samples: int, kernels: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Frames that the front end makes of `num_samples` samples."""
    for kernel, stride in zip(kernels, strides, strict=True):
        num_samples = max(num_samples - kernel, -stride) // stride + 1
    return num_samples


class Head(NamedTuple):
    """What the student predicts of one teacher: codes (K books of V) or F features (K = 0)."""

    name: str
    size: int
    num_codebooks: int = 0


class Output(NamedTuple):
    """What one pass returns.

    last_hidden_state: [B, T, D]; features_penalty: scalar, mean square of the conv features;
    predictions: by teacher, features [B, T, F] or (projections [B, T, K, d], codebooks [K, V, d]).
    """

    last_hidden_state: Array
    features_penalty: Array
    predictions: dict[str, Any]


def scale_gradient(x: Array, factor: float) -> Array:
    """`x` itself, with its gradient multiplied by `factor` (fairseq's GradMultiply)."""
    if factor == 1.0:
        return x
    frozen = jax.lax.stop_gradient(x)
    return frozen + factor * (x - frozen)


class FeatureProjection(nn.Module):
    """Norm and projection to width D, which equal widths may lack: [B, T, C] -> [B, T, D]."""

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


class EncoderLayer(nn.Module):
    """One transformer layer, post-norm (95M) or pre-norm (330M): [B, T, D] -> [B, T, D]."""

    num_heads: int
    intermediate_size: int
    pre_norm: bool
    hidden_dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    attention_relax: float
    fitted_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, padding: Array | None, deterministic: bool) -> tuple[Array, None]:
        drop = Dropout(self.hidden_dropout)
        attention = Attention(
            self.num_heads,
            self.attention_dropout,
            self.attention_relax,
            self.dtype,
            name="attention",
        )
        norm1 = Norm(self.dtype, name="layer_norm")
        norm2 = Norm(self.dtype, name="final_layer_norm")

        def feed_forward(y: Array) -> Array:
            up, down = (
                logical(encoder_init, *axes) for axes in (("embed", "mlp"), ("mlp", "embed"))
            )
            y = nn.Dense(
                self.intermediate_size, dtype=self.dtype, kernel_init=up, name="intermediate_dense"
            )(y)
            y = gelu(y, self.fitted_gelu)
            y = Dropout(self.activation_dropout)(y, deterministic)
            return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=down, name="output_dense")(y)

        if self.pre_norm:
            y = x + drop(attention(norm1(x), padding, deterministic), deterministic)
            y = y + drop(feed_forward(norm2(y)), deterministic)
        else:
            y = norm1(x + drop(attention(x, padding, deterministic), deterministic))
            y = norm2(y + drop(feed_forward(y), deterministic))
        if self.layerdrop and not deterministic:  # whole batch, no rescaling, as in fairseq
            keep = jax.random.uniform(self.make_rng("dropout")) > self.layerdrop
            y = jnp.where(keep, y, x)
        self.sow("intermediates", "hidden_states", y)
        return y, None


class Encoder(nn.Module):
    """Positions and L layers, whose parameters are stacked on a leading axis: [B, T, D] -> same."""

    num_layers: int
    pos_conv_kernel: int
    pos_conv_groups: int
    remat: str
    unroll: int
    layer: dict[str, Any]

    @nn.compact
    def __call__(self, x: Array, padding: Array | None, deterministic: bool) -> Array:
        layer = dict(self.layer)
        dtype, pre_norm = layer["dtype"], layer["pre_norm"]
        if padding is not None:
            x = jnp.where(padding[..., None], 0, x)
        positions = PosConvEmbed(
            self.pos_conv_kernel,
            self.pos_conv_groups,
            layer["fitted_gelu"],
            dtype,
            name="pos_conv_embed",
        )(x)
        self.sow("intermediates", "pos_conv_out", positions)
        norm = Norm(dtype, name="layer_norm")
        x = x + positions
        if not pre_norm:
            x = norm(x)
        x = Dropout(layer["hidden_dropout"])(x, deterministic)
        self.sow("intermediates", "encoder_input", x)
        layers = nn.scan(
            rematerialised(EncoderLayer, self.remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.num_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(**layer, name="layers")(x, padding, deterministic)
        return norm(x) if pre_norm else x


def rematerialised(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """The layer with what its backward pass recomputes: nothing ("none"), all but matrix products
    ("dots") or everything ("full")."""
    if policy == "none":
        return module
    keep = jax.checkpoint_policies
    # with attention's results its scores, T x T numbers a head, need not be kept
    dots = keep.save_from_both_policies(keep.checkpoint_dots, keep.save_only_these_names(ATTENDED))
    policies = {"dots": dots, "full": None}
    return nn.remat(module, policy=policies[policy], prevent_cse=False, static_argnums=(3,))


class Student(nn.Module):
    """MERT: wave [B, N] -> hidden states [B, T, D] and a prediction for each teacher.

    `num_frames` crops the conv features where a teacher has fewer frames. `mask` and `padding` are
    [B, T]; True hides a frame, or says that it is padding. `norm` is the front end's group norm
    where it is known (`FeatureEncoder`). Intermediate activations are sown under "intermediates":
    `hidden_states` of the layers come stacked, [L, B, T, D].
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
    project_equal_widths: bool = False  # where C = D; Hugging Face does, fairseq does not
    pos_conv_kernel: int = 128
    pos_conv_groups: int = 16
    feature_grad_mult: float = 1.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    attention_relax: float = 0.0
    fitted_gelu: bool = False
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of `num_samples` samples."""
        return num_frames(num_samples, self.conv_kernels, self.conv_strides)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_strides)

    @property
    def receptive_field(self) -> int:
        """Samples that a frame hears, the fewest that make one."""
        return receptive_field(self.conv_kernels, self.conv_strides)

    def flops(self, num_samples: int) -> float:
        """FLOPs of one forward pass of one clip: products of the front end, layers, positions and
        heads, two a multiply-add; norms and activations left out. A training step costs 3 times as
        many."""
        frames, width, total, channels = num_samples, self.hidden_size, 0, 1
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            frames = (frames - kernel) // stride + 1
            total += frames * kernel * channels * self.conv_dim
            channels = self.conv_dim
        attention = 4 * width**2 + 2 * frames * width
        layer = attention + 2 * width * self.intermediate_size
        positions = width**2 // self.pos_conv_groups * self.pos_conv_kernel
        heads = 0
        for _, size, books in self.heads:
            heads += books * self.final_dim * (width + size) if books else width * size
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
        if wave.ndim != 2:  # channels would pass for clips
            raise ValueError(f"wave is {wave.shape}, not [B, N]; average its channels first")
        full = full_precision(self.dtype)
        features = FeatureEncoder(
            self.conv_dim,
            self.conv_kernels,
            self.conv_strides,
            self.fitted_gelu,
            self.dtype,
            name="feature_encoder",
        )(wave, norm)
        features = scale_gradient(features, self.feature_grad_mult)[:, :num_frames]
        features_penalty = jnp.mean(jnp.square(features.astype(full)))
        self.sow("intermediates", "conv_features", features)

        x = FeatureProjection(
            self.hidden_size, self.project_equal_widths, self.dtype, name="feature_projection"
        )(features)
        self.sow("intermediates", "features_proj", x)
        x = Dropout(self.input_dropout)(x, deterministic)
        embed = self.param("masked_spec_embed", uniform(1.0), (self.hidden_size,))
        if mask is not None:
            x = jnp.where(mask[..., None], embed.astype(self.dtype)[None, None, :], x)
        self.sow("intermediates", "masked_input", x)

        x = Encoder(
            self.num_layers,
            self.pos_conv_kernel,
            self.pos_conv_groups,
            self.remat,
            self.unroll,
            dict(
                num_heads=self.num_heads,
                intermediate_size=self.intermediate_size,
                pre_norm=self.pre_norm,
                hidden_dropout=self.hidden_dropout,
                attention_dropout=self.attention_dropout,
                activation_dropout=self.activation_dropout,
                layerdrop=self.layerdrop,
                attention_relax=self.attention_relax,
                fitted_gelu=self.fitted_gelu,
                dtype=self.dtype,
            ),
            name="encoder",
        )(x, padding, deterministic)
        predictions = {head.name: self._predict(head, x.astype(full)) for head in self.heads}
        return Output(x, features_penalty, predictions)

    def _predict(self, head: Head, x: Array) -> Any:
        if not head.num_codebooks:
            return linear(head.size, self.hidden_size, x.dtype, f"{head.name}_proj")(x)
        size = head.num_codebooks * self.final_dim
        proj = linear(size, self.hidden_size, x.dtype, f"{head.name}_proj")(x)
        codebooks = self.param(
            f"{head.name}_codebooks",
            logical(uniform(1.0), None, "vocab", None),
            (head.num_codebooks, head.size, self.final_dim),
        )
        return proj.reshape(*x.shape[:2], head.num_codebooks, self.final_dim), codebooks


def hidden_states(
    student: Student,
    params: Any,
    wave: Array,
    padding: Array | None = None,
    norm: tuple[Array, Array] | None = None,
) -> Array:
    """The encoder's input and every layer's output, [L + 1, B, T, D]; the last one is after the
    final norm where there is one. Arguments as `Student`'s."""
    output, seen = student.apply(
        {"params": params}, wave, padding=padding, norm=norm, mutable=["intermediates"]
    )
    encoder = seen["intermediates"]["encoder"]
    layers = encoder["layers"]["hidden_states"][0][:-1]
    return jnp.concatenate(
        [encoder["encoder_input"][0][None], layers, output.last_hidden_state[None]]
    )
