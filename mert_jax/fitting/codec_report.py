"""The quality of a codec on held-out music: figures, and wav files to listen to."""

import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from mert_jax.constants import FULL_SCALE, SAMPLE_RATE
from mert_jax.data.code_checks import perplexity
from mert_jax.fitting import codec_step
from mert_jax.fitting.codec_step import Codec, CodecState
from mert_jax.models import quantize

EVALUATED = 32  # clips of the validation split at most
WRITTEN = 4  # of them written as wav


def held_out_clips(source: Any, num_samples: int) -> np.ndarray:
    """Return clips f32 [B, N] of the validation split, at most one a record, spread evenly."""
    chosen = np.linspace(0, len(source) - 1, min(EVALUATED, len(source))).astype(int)
    audio = [np.resize(source[int(i)]["audio"], num_samples) for i in chosen]
    return np.stack(audio).astype(np.float32) / FULL_SCALE


@functools.partial(jax.jit, static_argnames="codec")
def encode(params: Any, wave: jax.Array, codec: Codec) -> jax.Array:
    """Return latents [B, T, D] of `wave` [B, N]."""
    return codec.encoder.apply({"params": params["encoder"]}, wave)


@functools.partial(jax.jit, static_argnames="codec")
def reconstruct(
    params: Any, latents: jax.Array, wave: jax.Array, codebooks: jax.Array | None, codec: Codec
) -> tuple[jax.Array, ...]:
    """Return codes [B, T, K] (0 if none), log-mel distance and SI-SDR [B], decoded wave."""
    codes = jnp.zeros((*latents.shape[:2], 1), jnp.int32)
    if codebooks is not None:
        codes = quantize.residual_encode(latents, codebooks)[0]
        latents = quantize.residual_decode(codes, codebooks)
    decoded = codec.decoder.apply({"params": params["decoder"]}, latents)[:, : wave.shape[1]]
    mel, sdr = codec_step.mel_distance(wave, decoded), codec_step.si_sdr(wave, decoded)
    return codes, mel, sdr, decoded


def evaluate(
    codec: Codec, params: Any, codebooks: jax.Array | None, clips: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Return log-mel distance (nats), SI-SDR (dB) and perplexity by codebook; the decoded clips."""
    parts = []
    for clip in clips[:, None]:
        latents = encode(params, clip, codec)
        parts.append(reconstruct(params, latents, clip, codebooks, codec))
    codes, mel, sdr, waves = (np.concatenate(x) for x in zip(*parts, strict=True))
    figures = {"mel_distance": float(mel.mean()), "si_sdr": float(sdr.mean())}
    if codebooks is not None:
        by_book = codes.reshape(-1, codes.shape[-1]).T
        counts = np.stack([np.bincount(x, minlength=codebooks.shape[1]) for x in by_book])
        figures["code_perplexity"] = [round(float(x), 2) for x in perplexity(counts)]
    return figures, waves


def untrained(vectors: jax.Array, num_codebooks: int, size: int) -> jax.Array:
    """Return random codebooks [K, V, D] with the mean and std of what enters, `vectors` [n, D]."""
    drawn, residual = [], vectors
    for key in jax.random.split(jax.random.key(0), num_codebooks):
        noise = jax.random.normal(key, (size, vectors.shape[-1]))
        mean, std = residual.mean(0, keepdims=True), residual.std(0, keepdims=True)
        drawn.append(mean + std * noise)
        residual = residual - drawn[-1][quantize.nearest(residual, drawn[-1])]
    return jnp.stack(drawn)


def report(output: str, codec: Codec, state: CodecState, held_out: np.ndarray) -> None:
    """Write report.json and wav files of some clips before and after the codec."""
    trained = codec_step.codebooks(state.quantizer)
    vectors = jnp.concatenate([encode(state.params, clip, codec) for clip in held_out[:, None]])
    baseline = untrained(vectors.reshape(-1, codec.dim), codec.books, codec.size)
    figures, waves = {}, {"original": held_out}
    for kind, books in {"trained": trained, "untrained": baseline, "none": None}.items():
        figures[kind], waves[kind] = evaluate(codec, state.params, books, held_out)
    listen = os.path.join(output, "listen")
    os.makedirs(listen, exist_ok=True)
    for kind, clips in waves.items():
        for i, wave in enumerate(clips[:: max(1, len(clips) // WRITTEN)][:WRITTEN]):
            path = os.path.join(listen, f"{i}_{kind}.wav")
            soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
    with open(os.path.join(output, "report.json"), "w") as file:
        content = {"steps": int(state.step), "clips": len(held_out), "codebooks": figures}
        json.dump(content, file, indent=1)
    print(f"validation, {len(held_out)} clips, by codebooks:")
    for kind, x in figures.items():
        print(f"  {kind}: log-mel distance {x['mel_distance']:.3f}, SI-SDR {x['si_sdr']:.2f} dB")
    used = " ".join(f"{x:.0f}" for x in figures["trained"]["code_perplexity"])
    print(f"  perplexity of the codes: {used}")
    print(f"codec in {output}; clips before and after it in {listen}", flush=True)
