"""One update of a codec: encoder, residual quantiser, decoder. Pure functions of state and batch.

Shapes: B clips, N samples (a multiple of 320), T frames, K codebooks, V codes, D width of a latent.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mert_jax.models import encodec, spectrograms

Array = jax.Array
MEL_SCALES = (512, 1024, 2048)  # transform lengths, 21 to 85 ms, hop a quarter
MEL_BANDS = 64


class CodecState(NamedTuple):
    """Completed updates; params {"encoder", "decoder"}; optimiser state; haiku's state of the
    quantiser, codebooks and their moving averages."""

    step: Array
    params: Any
    opt_state: Any
    quantizer: Any


class Codec(NamedTuple):
    """What is trained, fixed for a run: networks, quantiser, optimiser and the loss's weights."""

    encoder: encodec.Encoder
    decoder: encodec.Decoder
    quantizer: hk.TransformedWithState
    optimizer: optax.GradientTransformation
    wave_weight: float
    dead_below: float


def make(
    *,
    filters: int,
    dim: int,
    books: int,
    size: int,
    learning_rate: float,
    total_steps: int,
    clip_norm: float,
    wave_weight: float,
    commitment: float,
    decay: float,
    dead_below: float,
) -> Codec:
    """A codec of `books` codebooks of `size` codes; a code that comes less often than `dead_below`
    times the average is set on a vector of the batch."""

    def quantize(latents: Array, is_training: bool) -> dict[str, Array]:
        """Straight-through sum of the books, codes [B, T, K], and what entered each book."""
        residual, loss, codes, entered = latents, 0.0, [], []
        for k in range(books):
            book = hk.nets.VectorQuantizerEMA(dim, size, commitment, decay, name=f"book_{k}")
            found = book(residual, is_training)
            entered.append(jax.lax.stop_gradient(residual).reshape(-1, dim))
            codes.append(found["encoding_indices"])
            loss += found["loss"] / books
            residual = residual - jax.lax.stop_gradient(found["quantize"])
        quantized = latents + jax.lax.stop_gradient(-residual)
        return dict(quantized=quantized, loss=loss, codes=jnp.stack(codes, -1), entered=entered)

    schedule = optax.cosine_decay_schedule(learning_rate, total_steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adam(schedule, 0.5, 0.9),  # EnCodec's, section 4.5
    )
    return Codec(
        encodec.Encoder(filters, dim),
        encodec.Decoder(filters),
        hk.transform_with_state(quantize),
        optimizer,
        wave_weight,
        dead_below,
    )


def init(c: Codec, key: Array) -> CodecState:
    """The state of a new run."""
    keys = jax.random.split(key, 3)
    latents = jnp.zeros((1, 8, c.encoder.dim))
    params = {
        "encoder": c.encoder.init(keys[0], jnp.zeros((1, 3200)))["params"],
        "decoder": c.decoder.init(keys[1], latents)["params"],
    }
    _, quantizer = c.quantizer.init(keys[2], latents, True)
    return CodecState(jnp.zeros((), jnp.int32), params, c.optimizer.init(params), quantizer)


def codebooks(quantizer: Mapping[str, Any]) -> Array:
    """The codebooks [K, V, D] in haiku's state, which has them as [D, V]."""
    books = sorted((name for name in quantizer if "/" not in name), key=lambda n: int(n[5:]))
    return jnp.stack([quantizer[name]["embeddings"].T for name in books])


@functools.cache
def _mel_filters() -> tuple[np.ndarray, ...]:
    return tuple(spectrograms.mel_filters(24_000, n_fft, MEL_BANDS) for n_fft in MEL_SCALES)


def mel_distance(wave: Array, other: Array) -> Array:
    """Mean difference of the log-mel spectra of two waves [B, N] over three scales, nats [B]."""
    distances = []
    for n_fft, filters in zip(MEL_SCALES, _mel_filters(), strict=True):
        ours, theirs = (
            spectrograms.log_mel(x, jnp.asarray(filters), n_fft // 4) for x in (wave, other)
        )
        distances.append(jnp.abs(ours - theirs).mean((1, 2)))
    return sum(distances) / len(distances)


def si_sdr(wave: Array, other: Array) -> Array:
    """Scale-invariant signal-to-distortion ratio of `other` to `wave` [B, N], dB (Le Roux et al.,
    arXiv 1811.02508, eq. 3)."""
    scale = jnp.sum(wave * other, -1) / jnp.maximum(jnp.sum(wave * wave, -1), 1e-8)
    target = scale[:, None] * wave
    power = lambda x: jnp.maximum(jnp.sum(jnp.square(x), -1), 1e-8)
    return 10 * jnp.log10(power(target) / power(other - target))


def train_step(
    state: CodecState, clips: Array, key: Array, c: Codec
) -> tuple[CodecState, dict[str, Array]]:
    """One update on int16 `clips` [B, N]: log-mel and waveform distance, and commitment (EnCodec,
    arXiv 2210.13438, section 3.4, without the adversary); returns the state and the metrics."""
    key = jax.random.fold_in(key, state.step)
    wave = clips.astype(jnp.float32) / 32768

    def loss_fn(params: Any) -> tuple[Array, tuple]:
        latents = c.encoder.apply({"params": params["encoder"]}, wave)
        found, quantizer = c.quantizer.apply({}, state.quantizer, None, latents, True)
        other = c.decoder.apply({"params": params["decoder"]}, found["quantized"])
        mel = mel_distance(wave, other).mean()
        error = jnp.abs(wave - other).mean()
        loss = mel + c.wave_weight * error + found["loss"]
        parts = dict(loss=loss, mel_distance=mel, wave_distance=error, commitment=found["loss"])
        return loss, (parts, quantizer, found)

    # nearly tied codes must not flip between this and the teacher that will read the codebooks
    with jax.default_matmul_precision("highest"):
        grads, (metrics, quantizer, found) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = c.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    quantizer, dead = revive(quantizer, found["entered"], key, c.dead_below)
    metrics |= dict(grad_norm=optax.tree.norm(grads), dead=dead)
    return CodecState(state.step + 1, params, opt_state, quantizer), metrics


def revive(
    quantizer: Mapping[str, Any], entered: list[Array], key: Array, dead_below: float
) -> tuple[dict[str, Any], Array]:
    """Set dead codes on random vectors that entered their book, as if they had come as often as the
    average; returns the state and the number revived in each book [K]."""
    quantizer, numbers = dict(quantizer), []
    for k, vectors in enumerate(entered):
        book = quantizer[f"book_{k}"]["embeddings"]
        size_name, sum_name = (f"book_{k}/~/ema_{name}" for name in ("cluster_size", "dw"))
        sizes, sums = quantizer[size_name], quantizer[sum_name]
        usual = vectors.shape[0] / book.shape[1]
        dead = sizes["average"] < dead_below * usual
        drawn = jax.random.randint(jax.random.fold_in(key, k), dead.shape, 0, vectors.shape[0])
        new = vectors[drawn].T
        # haiku divides `hidden` by this to make up for its start at zero
        debias = sizes["hidden"].sum() / jnp.maximum(sizes["average"].sum(), 1e-8)
        numbers.append(dead.sum())
        quantizer[f"book_{k}"] = {"embeddings": jnp.where(dead[None], new, book)}
        quantizer[size_name] = sizes | {
            "average": jnp.where(dead, usual, sizes["average"]),
            "hidden": jnp.where(dead, usual * debias, sizes["hidden"]),
        }
        quantizer[sum_name] = sums | {
            "average": jnp.where(dead[None], usual * new, sums["average"]),
            "hidden": jnp.where(dead[None], usual * debias * new, sums["hidden"]),
        }
    return quantizer, jnp.stack(numbers)
