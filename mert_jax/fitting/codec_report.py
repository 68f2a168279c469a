"""How well a codec does: what is heard of held-out music through its codebooks, in figures,
curves and wav files."""

import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data.code_checks import perplexity
from mert_jax.files import read_jsonl
from mert_jax.fitting import codec_step
from mert_jax.fitting.codec_step import Codec, CodecState
from mert_jax.models import quantize
from mert_jax.reporting import plots

EVALUATED = 32  # clips of the validation split at most
LISTENED = 4  # of them written as wav


def held_out_clips(source: Any, num_samples: int) -> np.ndarray:
    """Clips f32 [B, N] of the validation split, at most one a record, spread over its tracks."""
    chosen = np.linspace(0, len(source) - 1, min(EVALUATED, len(source))).astype(int)
    audio = [np.resize(source[int(i)]["audio"], num_samples) for i in chosen]
    return np.stack(audio).astype(np.float32) / 32768


@functools.partial(jax.jit, static_argnames="c")
def encode(params: Any, wave: jax.Array, c: Codec) -> jax.Array:
    """Latents [B, T, D] of `wave` [B, N]."""
    return c.encoder.apply({"params": params["encoder"]}, wave)


@functools.partial(jax.jit, static_argnames="c")
def reconstruct(params: Any, latents: jax.Array, wave: jax.Array, books: Any, c: Codec) -> tuple:
    """Codes, log-mel distance [B], SI-SDR [B] and the wave that comes back of `latents` through
    `books`, or past them where they are None."""
    codes = jnp.zeros((*latents.shape[:2], 1), jnp.int32)
    if books is not None:
        codes = quantize.residual_encode(latents, books)[0]
        latents = quantize.residual_decode(codes, books)
    other = c.decoder.apply({"params": params["decoder"]}, latents)[:, : wave.shape[1]]
    return codes, codec_step.mel_distance(wave, other), codec_step.si_sdr(wave, other), other


def evaluate(
    c: Codec, state: CodecState, clips: np.ndarray, every: bool = False
) -> dict[str, dict[str, Any]]:
    """Log-mel distance (nats), SI-SDR (dB) and perplexity of the codes on `clips`, with the trained
    codebooks; with `every`, also with untrained ones and with none, and the waves."""
    params, books = state.params, codec_step.codebooks(state.quantizer)
    latents = np.concatenate([np.asarray(encode(params, wave, c)) for wave in _rows(clips)])
    kinds: dict[str, Any] = {"trained": books}
    if every:
        vectors = jnp.asarray(latents.reshape(-1, latents.shape[-1]))
        kinds |= {"untrained": untrained(vectors, *books.shape[:2]), "none": None}
    figures = {}
    for kind, book in kinds.items():
        pairs = zip(_rows(latents), _rows(clips), strict=True)
        parts = [reconstruct(params, each, wave, book, c) for each, wave in pairs]
        codes, mel, sdr, waves = (np.concatenate(x) for x in zip(*parts, strict=True))
        figures[kind] = {"mel_distance": float(mel.mean()), "si_sdr": float(sdr.mean())}
        if book is not None:
            by_book = codes.reshape(-1, codes.shape[-1]).T
            counts = np.stack([np.bincount(x, minlength=book.shape[1]) for x in by_book])
            used = perplexity(counts)
            figures[kind]["code_perplexity"] = [round(float(x), 2) for x in used]
        if every:
            figures[kind]["waves"] = waves
    return figures


def untrained(vectors: jax.Array, books: int, size: int) -> jax.Array:
    """Codebooks [K, V, D] drawn from the normal distribution of what enters each, `vectors` [n, D]
    and what the books before leave: what training is to be compared with."""
    drawn, residual = [], vectors
    for key in jax.random.split(jax.random.key(0), books):
        noise = jax.random.normal(key, (size, vectors.shape[-1]))
        mean, std = residual.mean(0, keepdims=True), residual.std(0, keepdims=True)
        drawn.append(mean + std * noise)
        residual = residual - drawn[-1][quantize.nearest(residual, drawn[-1])]
    return jnp.stack(drawn)


def _rows(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[i : i + 1] for i in range(len(x)))


def report(output: str, training: str, c: Codec, state: CodecState, held_out: np.ndarray) -> None:
    """Write report.json, report.png and, to listen to, clips before and after."""
    figures = evaluate(c, state, held_out, every=True)
    os.makedirs(os.path.join(output, "listen"), exist_ok=True)
    waves = {"original": held_out} | {kind: x.pop("waves") for kind, x in figures.items()}
    for kind, clips in waves.items():
        for i, wave in enumerate(clips[:: max(1, len(clips) // LISTENED)][:LISTENED]):
            path = os.path.join(output, "listen", f"{i}_{kind}.wav")
            soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
    found = {"steps": int(state.step), "clips": len(held_out), "codebooks": figures}
    with open(os.path.join(output, "report.json"), "w") as f:
        json.dump(found, f, indent=1)
    rows = read_jsonl(os.path.join(training, "metrics.jsonl"))
    with open(os.path.join(output, "report.png"), "wb") as f:
        f.write(plots.png(panels(rows), rows[-1]["step"], columns=2))
    print(f"validation, {len(held_out)} clips, by codebooks:")
    for kind, x in figures.items():
        print(f"  {kind}: log-mel distance {x['mel_distance']:.3f}, SI-SDR {x['si_sdr']:.2f} dB")
    used = " ".join(f"{x:.0f}" for x in figures["trained"]["code_perplexity"])
    print(f"  perplexity of the codes: {used}")
    print(f"codec in {output}; before and after in {os.path.join(output, 'listen')}", flush=True)


def panels(rows: list[dict[str, Any]]) -> list[plots.Panel]:
    """The curves of a fit."""

    def lines(name: str) -> list[plots.Line]:
        steps, values = plots.series(rows, name)
        return [plots.curve(steps, values[:, 0], "training", plots.TRAIN)] if len(steps) else []

    def held_out(name: str) -> list[plots.Line]:
        steps, values = plots.series(rows, f"validation_{name}")
        style = ("validation", plots.VALIDATION, 2.2)
        return [plots.curve(steps, values[:, 0], *style)] if len(steps) else []

    return [
        plots.Panel("Log-mel distance", "nats", lines("mel_distance") + held_out("mel_distance")),
        plots.Panel("SI-SDR", "dB", held_out("si_sdr")),
        plots.Panel("Waveform distance", "mean absolute", lines("wave_distance")),
        plots.Panel("Commitment", "mean square", lines("commitment"), "log"),
    ]
