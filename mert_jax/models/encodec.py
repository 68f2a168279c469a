"""The networks of EnCodec (arXiv 2210.13438, section 3.1): causal encoder and decoder, in float32.

Shapes: B clips, N samples, T = ceil(N / hop) frames, C channels, D width of a latent frame. Frame t
depends on all samples before hop * (t + 1), and the first six on the reflection before the start.

A long recording is encoded in parts, with the same latents: the flax collection `stream` has the
end of each convolution's last input and the LSTM's state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array
RATIOS = (2, 4, 5, 8)  # of the encoder's downsampling: 24 kHz to 75 frames a second
# codes are labels: near ties would flip in bf16 or TF32
PRECISION = jax.lax.Precision.HIGHEST


class Stream(NamedTuple):
    """The parts of recordings that the rows of a batch hold."""

    start: Array  # True for the first part of a recording, bool [B]
    length: Array  # number of samples or frames before the padding, int32 [B]


def reflect_pad(x: Array, left: int, right: int) -> Array:
    """Pad `x` [B, N, C] by reflection, after zeros at its end if it is short (encodec, pad1d)."""
    short = max(0, max(left, right) - x.shape[1] + 1)
    x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
    x = jnp.pad(x, ((0, 0), (left, right), (0, 0)), mode="reflect")
    return x[:, : x.shape[1] - short]


class CausalConv(nn.Module):
    """Causal convolution: [B, N, C] -> [B, ceil(N / stride), features]."""

    features: int
    kernel_size: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, stream: Stream | None = None) -> Array:
        left = self.kernel_size - self.stride
        if stream is None:
            x = reflect_pad(x, left, -x.shape[1] % self.stride)
        elif left:
            x = self._continue(x, left, stream)
        sizes = self.features, self.kernel_size, self.stride
        return nn.Conv(*sizes, padding="VALID", precision=PRECISION, name="conv")(x)

    def _continue(self, x: Array, left: int, stream: Stream) -> Array:
        """Put the end of the row's last part before `x`, and reflect the end of a recording."""
        before = self.variable("stream", "context", jnp.zeros_like, x[:, :left])
        start = jnp.where(stream.start[:, None, None], x[:, left:0:-1], before.value)
        x = jnp.concatenate([start, x], 1)
        before.value = x[:, -left:]
        if self.stride > 1:  # the last frame may need samples beyond the end
            last, index = stream.length[:, None] + left - 1, jnp.arange(x.shape[1])[None]
            index = jnp.where(index > last, jnp.maximum(2 * last - index, 0), index)
            x = jnp.take_along_axis(x, index[..., None], 1)
        return x


class ResidualBlock(nn.Module):
    """[B, N, C] -> [B, N, C]: shortcut(x) + conv2(elu(conv1(elu(x))))."""

    hidden: int

    @nn.compact
    def __call__(self, x: Array, stream: Stream | None = None) -> Array:
        y = CausalConv(self.hidden, 3, name="conv1")(nn.elu(x), stream)
        y = CausalConv(x.shape[-1], 1, name="conv2")(nn.elu(y), stream)
        return CausalConv(x.shape[-1], 1, name="shortcut")(x, stream) + y


class LSTM(nn.Module):
    """One layer, [B, T, C] -> [B, T, C], gates in torch's order: input, forget, cell, output."""

    @nn.compact
    def __call__(self, x: Array, stream: Stream | None = None) -> Array:
        width = x.shape[-1]
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's
        kernel = self.param("recurrent", uniform, (width, 4 * width))
        # the input products of all frames at once; only the recurrent ones are sequential
        gates = nn.Dense(4 * width, precision=PRECISION, name="input")(x)
        carry = (jnp.zeros((x.shape[0], width), x.dtype),) * 2
        if stream is not None:
            last = self.variable("stream", "carry", lambda: carry)
            carry = jax.tree.map(lambda x: jnp.where(stream.start[:, None], 0, x), last.value)

        def step(carry: tuple[Array, Array], gate: Array) -> tuple[tuple[Array, Array], Array]:
            h, c = carry
            i, f, g, o = jnp.split(gate + jnp.matmul(h, kernel, precision=PRECISION), 4, -1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        carry, y = jax.lax.scan(step, carry, gates.swapaxes(0, 1))
        if stream is not None:
            last.value = carry
        return y.swapaxes(0, 1)


class Encoder(nn.Module):
    """[B, N] at 24 kHz -> [B, ceil(N / 320), dim] (facebookresearch/encodec, SEANetEncoder)."""

    filters: int = 32
    dim: int = 128
    lstm_layers: int = 2

    @nn.compact
    def __call__(self, wave: Array, stream: Stream | None = None) -> Array:
        x = CausalConv(self.filters, 7, name="conv_in")(wave[..., None], stream)
        for i, ratio in enumerate(RATIOS):
            width = x.shape[-1]
            x = ResidualBlock(width // 2, name=f"block_{i}")(x, stream)
            x = CausalConv(2 * width, 2 * ratio, ratio, name=f"down_{i}")(nn.elu(x), stream)
            if stream is not None:
                stream = stream._replace(length=-(-stream.length // ratio))
        y = x
        for i in range(self.lstm_layers):
            y = LSTM(name=f"lstm_{i}")(y, stream)
        return CausalConv(self.dim, 7, name="conv_out")(nn.elu(x + y), stream)


class Upsample(nn.Module):
    """Causal transposed convolution of 2 `ratio` taps: [B, T, C] -> [B, T * ratio, features]."""

    features: int
    ratio: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        before, width = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1], self.ratio * self.features
        y = nn.Dense(width, use_bias=False, name="now")(x)
        y += nn.Dense(width, use_bias=False, name="before")(before)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y.reshape(x.shape[0], -1, self.features) + bias[None, None]


class Decoder(nn.Module):
    """Decoder, the mirror image of the encoder: [B, T, dim] -> [B, 320 T] (SEANetDecoder)."""

    filters: int = 32
    lstm_layers: int = 2

    @nn.compact
    def __call__(self, latents: Array) -> Array:
        width = self.filters * 2 ** len(RATIOS)
        x = CausalConv(width, 7, name="conv_in")(latents)
        y = x
        for i in range(self.lstm_layers):
            y = LSTM(name=f"lstm_{i}")(y)
        x = x + y
        for i, ratio in enumerate(reversed(RATIOS)):
            width //= 2
            x = Upsample(width, ratio, name=f"up_{i}")(nn.elu(x))
            x = ResidualBlock(width // 2, name=f"block_{i}")(x)
        return CausalConv(1, 7, name="conv_out")(nn.elu(x))[..., 0]
