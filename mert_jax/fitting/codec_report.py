"""The quality of a codec on held-out music: figures, curves, and wav files to listen to."""

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
from mert_jax.files import read_jsonl
from mert_jax.fitting import codec_step
from mert_jax.fitting.codec_step import Codec, CodecState
from mert_jax.models import quantize
from mert_jax.reporting import plots

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
    """Return codes, log-mel distance [B], SI-SDR [B] and the decoded wave of `latents`.

    The codes [B, T, K] are 0 if `codebooks` is None: the latents are then decoded as they are.
    """
    codes = jnp.zeros((*latents.shape[:2], 1), jnp.int32)
    if codebooks is not None:
        codes = quantize.residual_encode(latents, codebooks)[0]
        latents = quantize.residual_decode(codes, codebooks)
    decoded = codec.decoder.apply({"params": params["decoder"]}, latents)[:, : wave.shape[1]]
    mel, sdr = codec_step.mel_distance(wave, decoded), codec_step.si_sdr(wave, decoded)
    return codes, mel, sdr, decoded


def evaluate(
    codec: Codec, state: CodecState, clips: np.ndarray, compare: bool = False
) -> dict[str, dict[str, Any]]:
    """Return log-mel distance (nats), SI-SDR (dB) and perplexity of the trained codebooks.

    With `compare`, also those of untrained codebooks and of none, and the decoded waves.
    """
    trained = codec_step.codebooks(state.quantizer)
    latents = [encode(state.params, clip[None], codec) for clip in clips]
    kinds: dict[str, Any] = {"trained": trained}
    if compare:
        vectors = jnp.concatenate(latents).reshape(-1, trained.shape[-1])
        kinds |= {"untrained": untrained(vectors, *trained.shape[:2]), "none": None}
    figures = {}
    for kind, codebooks in kinds.items():
        parts = [
            reconstruct(state.params, latent, clip[None], codebooks, codec)
            for latent, clip in zip(latents, clips, strict=True)
        ]
        codes, mel, sdr, waves = (np.concatenate(x) for x in zip(*parts, strict=True))
        figures[kind] = {"mel_distance": float(mel.mean()), "si_sdr": float(sdr.mean())}
        if codebooks is not None:
            by_book = codes.reshape(-1, codes.shape[-1]).T
            counts = [np.bincount(x, minlength=codebooks.shape[1]) for x in by_book]
            used = perplexity(np.stack(counts))
            figures[kind]["code_perplexity"] = [round(float(x), 2) for x in used]
        if compare:
            figures[kind]["waves"] = waves
    return figures


def untrained(vectors: jax.Array, num_codebooks: int, size: int) -> jax.Array:
    """Return random codebooks [K, V, D], the baseline of training.

    Each is drawn from a normal distribution with the mean and deviation of what enters it:
    `vectors` [n, D], and the residuals of the codebooks before.
    """
    drawn, residual = [], vectors
    for key in jax.random.split(jax.random.key(0), num_codebooks):
        noise = jax.random.normal(key, (size, vectors.shape[-1]))
        mean, std = residual.mean(0, keepdims=True), residual.std(0, keepdims=True)
        drawn.append(mean + std * noise)
        residual = residual - drawn[-1][quantize.nearest(residual, drawn[-1])]
    return jnp.stack(drawn)


def report(
    output: str, training: str, codec: Codec, state: CodecState, held_out: np.ndarray
) -> None:
    """Write report.json, report.png and wav files of some clips before and after the codec."""
    figures = evaluate(codec, state, held_out, compare=True)
    listen = os.path.join(output, "listen")
    os.makedirs(listen, exist_ok=True)
    waves = {"original": held_out} | {kind: x.pop("waves") for kind, x in figures.items()}
    for kind, clips in waves.items():
        for i, wave in enumerate(clips[:: max(1, len(clips) // WRITTEN)][:WRITTEN]):
            path = os.path.join(listen, f"{i}_{kind}.wav")
            soundfile.write(path, wave, SAMPLE_RATE, subtype="PCM_16")
    with open(os.path.join(output, "report.json"), "w") as file:
        content = {"steps": int(state.step), "clips": len(held_out), "codebooks": figures}
        json.dump(content, file, indent=1)
    rows = read_jsonl(os.path.join(training, "metrics.jsonl"))
    with open(os.path.join(output, "report.png"), "wb") as file:
        file.write(plots.png(panels(rows), rows[-1]["step"], columns=2))
    print(f"validation, {len(held_out)} clips, by codebooks:")
    for kind, x in figures.items():
        print(f"  {kind}: log-mel distance {x['mel_distance']:.3f}, SI-SDR {x['si_sdr']:.2f} dB")
    used = " ".join(f"{x:.0f}" for x in figures["trained"]["code_perplexity"])
    print(f"  perplexity of the codes: {used}")
    print(f"codec in {output}; clips before and after it in {listen}", flush=True)


def panels(rows: list[dict[str, Any]]) -> list[plots.Panel]:
    """Return the curves of a run."""

    def lines(*names: str) -> list[plots.Line]:
        curves = []
        for name in names:
            steps, values = plots.series(rows, name)
            style = ("training", plots.TRAIN)
            if name.startswith("validation_"):
                style = ("validation", plots.VALIDATION, 2.2)
            curves += [plots.curve(steps, values[:, 0], *style)] if len(steps) else []
        return curves

    mel = lines("mel_distance", "validation_mel_distance")
    return [
        plots.Panel("Log-mel distance", "nats", mel),
        plots.Panel("SI-SDR", "dB", lines("validation_si_sdr")),
        plots.Panel("Waveform distance", "mean absolute", lines("wave_distance")),
        plots.Panel("Commitment", "mean square", lines("commitment"), "log"),
    ]
