"""Source separation: a head predicts the share of each source in each frame of the mixture.

In the spirit of a43992899/MARBLE-Benchmark (`benchmark/tasks/MUSDB18`): frozen features and the
mixture's spectrogram at 24 kHz, mono, with the mixture's phases. There an LSTM masks one source in
every bin; here a head without memory masks all of them in bands, so that the features must know.

Shapes: N samples, T frames, F bins, K bands, M sources, S seeds.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import librosa
import numpy as np

from mert_jax import files
from mert_jax.probing import head, objectives, sampling, scores, selection
from mert_jax.probing.cache import Frames
from mert_jax.tasks.task import Task

N_FFT, BANDS = 2048, 64
SILENT = 1e-6  # energy below which a source is silent and has no SDR


def filters(sample_rate: int) -> np.ndarray:
    """Return f32 [F, K] that interpolate bins from bands spaced evenly in mel."""
    centres = librosa.mel_frequencies(BANDS, fmin=0, fmax=sample_rate / 2)
    bins = np.arange(N_FFT // 2 + 1) * sample_rate / N_FFT
    return np.stack([np.interp(bins, centres, row) for row in np.eye(BANDS)], 1).astype(np.float32)


def spectrum(wave: np.ndarray, hop: int) -> np.ndarray:
    """Return the complex spectrum [..., F, N // hop + 1], in the frames of the features."""
    return librosa.stft(wave, n_fft=N_FFT, hop_length=hop)


def shares(waves: np.ndarray, bands: np.ndarray, hop: int) -> np.ndarray:
    """Return band magnitudes of the mixture and energy shares of its sources, f32 [T, 1 + M, K].

    `waves` [1 + M, N] are the mixture and its sources.
    """
    energy = np.square(np.abs(spectrum(waves, hop))).transpose(2, 0, 1) @ bands
    together = energy[:, 1:].sum(1, keepdims=True)
    parts = energy[:, 1:] / np.maximum(together, 1e-8)
    # equal shares if all are silent
    parts = np.where(together > 1e-8, parts, 1 / parts.shape[1])
    return np.concatenate([np.sqrt(energy[:, :1]), parts], 1)


def loss(logits: jax.Array, target: dict[str, jax.Array]) -> jax.Array:
    """Return the squared error of the masks [N, M, K], weighted by the mixture's band energy."""
    masks = jax.nn.softmax(logits.reshape(target["masks"].shape), 1)
    error = jnp.square(masks - target["masks"].astype(jnp.float32)).sum(1)
    return (error * target["energy"]).sum(-1)


_QUALITY = objectives.negative(loss)


def sdr(truth: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Return the energy ratio of source and error over a whole song, dB [M] from [M, N].

    GlobalSDR of MARBLE-Benchmark; NaN for a silent source.
    """
    energy = np.square(truth, dtype=np.float64).sum(1)
    error = np.square(truth - estimate, dtype=np.float64).sum(1)
    return np.where(energy > SILENT, 10 * np.log10((energy + 1e-7) / (error + 1e-7)), np.nan)


def museval_sdr(truth: np.ndarray, estimate: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return museval's SDR of each source of a song, dB [M] from [M, N].

    BSS Eval v4 in frames of a second, median over frames; NaN for a silent source.
    """
    metrics = scores.needed("museval.metrics")
    rows = np.flatnonzero(np.square(truth).sum(1) > SILENT)
    medians = np.full(len(truth), np.nan)
    if len(rows):
        # frames of one second; the rest of the last second has none
        frames = metrics.bss_eval(
            truth[rows, :, None], estimate[rows, :, None], window=sample_rate, hop=sample_rate
        )[0]
        known = ~np.isnan(frames).all(1)
        medians[rows[known]] = np.nanmedian(frames[known], 1)
    return medians


def probe(
    task: Task,
    splits: dict[str, Frames],
    settings: head.HeadSettings,
    names: list[str],
    tick: Callable[[], Any],
) -> selection.Row:
    """Train, choose the layer by validation songs and score the test songs.

    The learning rate is chosen by the loss of validation frames; "sdr" is the mean over songs and
    sources, "sdr_museval" the median over songs of each source, and the mean of those.
    """
    train = splits["train"]
    hop, bands = round(train.sample_rate / train.frame_rate), filters(train.sample_rate)
    sources = len(task.labels)
    for table in splits.values():
        _store_shares(table, bands, hop)
    some = range(0, len(train.clips), -(-len(train.clips) // 200))
    level = max(float(np.mean([_energy(train, i).mean() for i in some])), 1e-12)

    def targets_of(table: Frames) -> Callable[[int], dict[str, np.ndarray]]:
        return lambda i: {"energy": _energy(table, i) / level, "masks": _stored(table, i)[:, 1:]}

    fitted = head.fit(
        lambda epoch: sampling.draw(train, targets_of(train), sampling.TRAIN, epoch),
        sampling.draw(splits["valid"], targets_of(splits["valid"]), sampling.VALID, 0),
        objectives.Objective(sources * BANDS, loss, _QUALITY),
        settings._replace(batch_size=8 * settings.batch_size),
        tick,
    )
    rate_of = np.nan_to_num(fitted.quality.mean(0), nan=-np.inf).argmax(0)  # [Q]

    def songs(split: str, choice: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        def predict(x: np.ndarray) -> np.ndarray:
            logits = head.predict(fitted, x, choice, rate_of[choice])
            return _softmax(logits.reshape(*logits.shape[:2], sources, BANDS))

        return estimate_songs(splits[split], predict, bands, hop)

    def plain(split: str, choice: int) -> list[float]:
        rows = [[sdr(truth, one) for one in estimates] for truth, estimates in songs(split, choice)]
        return np.nanmean(rows, (0, 2)).tolist()

    def test(choice: int, rate: int) -> dict[str, list[float]]:
        return {"sdr": plain("test", choice)}

    def final(choice: int, rate: int) -> dict[str, list[float]]:
        rows = [
            [museval_sdr(truth, one, train.sample_rate) for one in estimates]
            for truth, estimates in songs("test", choice)
        ]
        return _by_source(np.array(rows), task.labels)

    valid = np.full((len(names), len(settings.rates), settings.seeds), np.nan)
    for choice in range(len(names)):
        valid[choice, rate_of[choice]] = plain("valid", choice)
    return selection.select(valid, names, settings.rates, task.metrics, test, final)


def estimate_songs(
    table: Frames, predict: Callable[[np.ndarray], np.ndarray], bands: np.ndarray, hop: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the true and the estimated sources of each song, [M, N] and [S, M, N].

    `predict` maps features [T, L, D] to the masks of every seed [S, T, M, K].
    """
    for members in _songs(table):
        truth, estimates = [], []
        for i in members:
            waves, masks = table.waves(i), predict(table.features(i).swapaxes(0, 1))
            truth.append(waves[1:])
            estimates.append(np.stack([separate(waves[0], m, bands, hop) for m in masks]))
        yield np.concatenate(truth, -1), np.concatenate(estimates, -1)


def chance(task: Task, splits: dict[str, Frames]) -> dict[str, float]:
    """Return the scores of an equal share of the mixture for each source."""
    table, plain, median = splits["test"], [], []
    for members in _songs(table):
        waves = np.concatenate([table.waves(i) for i in members], -1)
        same = np.repeat(waves[:1] / len(task.labels), len(task.labels), 0)
        plain.append(sdr(waves[1:], same))
        median.append(museval_sdr(waves[1:], same, table.sample_rate))
    by_source = _by_source(np.array(median)[:, None], task.labels)
    return {"sdr": float(np.nanmean(plain))} | {name: x[0] for name, x in by_source.items()}


def separate(mixture: np.ndarray, masks: np.ndarray, bands: np.ndarray, hop: int) -> np.ndarray:
    """Return waves f32 [M, N] from a mixture [N] and masks [T, M, K]; the last mask is extended."""
    mixed = spectrum(mixture, hop)
    at = np.minimum(np.arange(mixed.shape[-1]), len(masks) - 1)
    gains = np.einsum("tmk,fk->mft", masks[at], bands)
    return librosa.istft(gains * mixed[None], n_fft=N_FFT, hop_length=hop, length=len(mixture))


def _by_source(rows: np.ndarray, labels: Sequence[str]) -> dict[str, list[float]]:
    """Return each source's median over songs of `rows` [songs, S, M], and their mean."""
    each = np.nanmedian(rows, 0)
    means = {"sdr_museval": each.mean(1).tolist()}
    return means | {f"sdr_museval_{name}": each[:, m].tolist() for m, name in enumerate(labels)}


def _songs(table: Frames) -> list[list[int]]:
    """Return the clips of each song in order."""
    songs: dict[str, list[int]] = {}
    for i, clip in enumerate(table.clips):
        songs.setdefault(clip.group or str(i), []).append(i)
    return [sorted(members, key=lambda i: table.clips[i].start) for members in songs.values()]


def _store_shares(table: Frames, bands: np.ndarray, hop: int) -> None:
    """Write the `shares` of every clip beside its features, unless they exist."""
    for i in range(len(table.clips)):
        path = _shares_path(table, i)
        if not os.path.exists(path):
            stored = shares(table.waves(i), bands, hop).astype(np.float16)
            with files.atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, stored)


def _shares_path(table: Frames, i: int) -> str:
    return os.path.join(table.folder, f"{table.stems[i]}.shares{BANDS}.npy")


def _stored(table: Frames, i: int) -> np.ndarray:
    return np.load(_shares_path(table, i), mmap_mode="r")


def _energy(table: Frames, i: int) -> np.ndarray:
    """Return the mixture's energy in each frame and band, f32 [T, K]."""
    return np.square(_stored(table, i)[:, 0], dtype=np.float32)


def _softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the sources of [..., M, K]."""
    exponentials = np.exp(x - x.max(-2, keepdims=True))
    return exponentials / exponentials.sum(-2, keepdims=True)
