"""One update of a codec: encoder, residual quantiser, decoder. Pure functions of state and batch.

Shapes: B clips, N samples (a multiple of 320), T frames, K codebooks, V codes, D width of a latent.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from mert_jax.constants import FULL_SCALE, SAMPLE_RATE
from mert_jax.models import encodec, spectrograms

Array = jax.Array
MEL_SCALES = (512, 1024, 2048)  # transform lengths, 21 to 85 ms, hop a quarter
MEL_BANDS = 64
_mel_filters = functools.cache(spectrograms.mel_filters)


class CodecState(NamedTuple):
    """Number of updates, params {"encoder", "decoder"}, states of optimiser and haiku quantiser."""

    step: Array
    params: Any
    opt_state: Any
    quantizer: Any


@dataclasses.dataclass(frozen=True)
class Codec:
    """A codec and its training; the default is EnCodec at 24 kHz (arXiv 2210.13438, 3.2, 4.5)."""

    filters: int = 32  # channels of the first convolution; the LSTM has 16 times as many
    dim: int = 128
    books: int = 8
    size: int = 1024
    total_steps: int = 200_000
    learning_rate: float = 3e-4
    clip_norm: float = 1.0
    wave_weight: float = 10.0  # of the waveform distance; that of the log-mel distance is 1
    commitment: float = 0.25
    decay: float = 0.99  # of the codebooks' moving averages
    dead_below: float = 0.1  # codes used less than this fraction of the average are moved

    @property
    def encoder(self) -> encodec.Encoder:
        return encodec.Encoder(self.filters, self.dim)

    @property
    def decoder(self) -> encodec.Decoder:
        return encodec.Decoder(self.filters)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """EnCodec's Adam (section 4.5), with gradient clipping and a cosine schedule."""
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.total_steps)
        clip = optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(clip, optax.adam(schedule, 0.5, 0.9))

    @property
    def quantizer(self) -> hk.TransformedWithState:
        return hk.transform_with_state(functools.partial(_quantize, self))


def _quantize(codec: Codec, latents: Array, is_training: bool) -> dict[str, Any]:
    """Straight-through sum of the codebooks, codes [B, T, K], and what entered each codebook."""
    residual, loss, codes, entered = latents, 0.0, [], []
    sizes = codec.dim, codec.size, codec.commitment, codec.decay
    for k in range(codec.books):
        output = hk.nets.VectorQuantizerEMA(*sizes, name=f"book_{k}")(residual, is_training)
        entered.append(jax.lax.stop_gradient(residual).reshape(-1, codec.dim))
        codes.append(output["encoding_indices"])
        loss += output["loss"] / codec.books
        residual = residual - jax.lax.stop_gradient(output["quantize"])
    quantized = latents + jax.lax.stop_gradient(-residual)
    return dict(quantized=quantized, loss=loss, codes=jnp.stack(codes, -1), entered=entered)


def init(codec: Codec, key: Array) -> CodecState:
    keys = jax.random.split(key, 3)
    latents = jnp.zeros((1, 8, codec.dim))
    encoder = codec.encoder.init(keys[0], jnp.zeros((1, 3200)))["params"]
    params = {"encoder": encoder, "decoder": codec.decoder.init(keys[1], latents)["params"]}
    _, quantizer = codec.quantizer.init(keys[2], latents, True)
    return CodecState(jnp.zeros((), jnp.int32), params, codec.optimizer.init(params), quantizer)


def codebooks(quantizer: Mapping[str, Any]) -> Array:
    """Return the codebooks [K, V, D] of haiku's state, which has them as [D, V]."""
    num_codebooks = sum("/" not in name for name in quantizer)
    return jnp.stack([quantizer[f"book_{k}"]["embeddings"].T for k in range(num_codebooks)])


def mel_distance(wave: Array, other: Array) -> Array:
    """Return the mean difference of the log-mel spectra of two waves [B, N], nats [B]."""
    distances = []
    for n_fft in MEL_SCALES:
        filters = jnp.asarray(_mel_filters(SAMPLE_RATE, n_fft, MEL_BANDS))
        a, b = (spectrograms.log_mel(x, filters, n_fft // 4) for x in (wave, other))
        distances.append(jnp.abs(a - b).mean((1, 2)))
    return sum(distances) / len(distances)


def si_sdr(wave: Array, other: Array) -> Array:
    """Return the SI-SDR of `other` to `wave` [B, N], dB [B] (Le Roux, arXiv 1811.02508, eq. 3)."""

    def power(x: Array) -> Array:
        return jnp.maximum(jnp.sum(jnp.square(x), -1), 1e-8)

    target = (jnp.sum(wave * other, -1) / power(wave))[:, None] * wave
    return 10 * jnp.log10(power(target) / power(other - target))


def train_step(state: CodecState, clips: Array, key: Array, codec: Codec) -> tuple[CodecState, Any]:
    """Make one update on int16 `clips` [B, N]; return the state and the metrics.

    The loss is that of EnCodec (arXiv 2210.13438, section 3.4) without the adversary.
    """
    key, wave = jax.random.fold_in(key, state.step), clips.astype(jnp.float32) / FULL_SCALE

    def loss_fn(params: Any) -> tuple[Array, tuple]:
        latents = codec.encoder.apply({"params": params["encoder"]}, wave)
        output, quantizer = codec.quantizer.apply({}, state.quantizer, None, latents, True)
        decoded = codec.decoder.apply({"params": params["decoder"]}, output["quantized"])
        mel = mel_distance(wave, decoded).mean()
        error = jnp.abs(wave - decoded).mean()
        loss = mel + codec.wave_weight * error + output["loss"]
        parts = dict(loss=loss, mel_distance=mel, wave_distance=error, commitment=output["loss"])
        return loss, (parts, quantizer, output["entered"])

    # nearly tied codes must be the same here and in the teacher that reads the codebooks
    with jax.default_matmul_precision("highest"):
        grads, (metrics, quantizer, entered) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = codec.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    quantizer, dead = revive(quantizer, entered, key, codec.dead_below)
    metrics |= dict(grad_norm=optax.tree.norm(grads), dead=dead)
    return CodecState(state.step + 1, params, opt_state, quantizer), metrics


def revive(quantizer: Any, entered: list[Array], key: Array, dead_below: float) -> tuple[Any, Any]:
    """Move codes used less than `dead_below` times the average to vectors that entered their book.

    Returns the state, where they are of average use, and how many moved in each codebook [K].
    """
    quantizer, revived = dict(quantizer), []
    for k, vectors in enumerate(entered):
        book, sizes, sums = (f"book_{k}{x}" for x in ("", "/~/ema_cluster_size", "/~/ema_dw"))
        used = quantizer[sizes]["average"]
        usual = len(vectors) / len(used)
        dead = used < dead_below * usual
        drawn = jax.random.randint(jax.random.fold_in(key, k), dead.shape, 0, len(vectors))
        new = vectors[drawn].T
        # haiku divides `hidden` by this to correct for its start at zero
        debias = quantizer[sizes]["hidden"].sum() / jnp.maximum(used.sum(), 1e-8)
        moved = {
            book: {"embeddings": new},
            sizes: {"average": usual, "hidden": usual * debias},
            sums: {"average": usual * new, "hidden": usual * debias * new},
        }
        for name, arrays in moved.items():
            old = quantizer[name]
            at = {x: jnp.broadcast_to(dead, old[x].shape) for x in arrays}
            quantizer[name] = old | {x: jnp.where(at[x], arrays[x], old[x]) for x in arrays}
        revived.append(dead.sum())
    return quantizer, jnp.stack(revived)
