"""Source separation: a head predicts the share of each source in each frame of the mixture.

In the spirit of a43992899/MARBLE-Benchmark (`benchmark/tasks/MUSDB18`): frozen features and the
mixture's spectrogram at 24 kHz, mono, with the mixture's phases. There an LSTM masks one source in
every bin; here a head without memory masks all of them in bands, so that the features must know.

Shapes: N samples, T frames, F bins, K bands, M sources, S seeds.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import scipy.special

from mert_jax.probing import cache, head, objectives, sampling, scores, selection
from mert_jax.probing.cache import Frames
from mert_jax.probing.head import HeadSettings
from mert_jax.tasks.task import Task

N_FFT, BANDS = 2048, 64
SILENT = 1e-6  # energy below which a source is silent and has no SDR


def filters(sample_rate: int) -> np.ndarray:
    """Return f32 [F, K] that interpolate bins from bands spaced evenly in mel."""
    centres = librosa.mel_frequencies(BANDS, fmin=0, fmax=sample_rate / 2)
    bins = np.arange(N_FFT // 2 + 1) * sample_rate / N_FFT
    return np.stack([np.interp(bins, centres, row) for row in np.eye(BANDS)], 1).astype(np.float32)


def shares(waves: np.ndarray, bands: np.ndarray, hop: int) -> np.ndarray:
    """Return the mixture's band magnitudes and its sources' energy shares, f32 [T, 1 + M, K]."""
    spectrum = librosa.stft(waves, n_fft=N_FFT, hop_length=hop)  # [1 + M, F, T]
    energy = np.square(np.abs(spectrum)).transpose(2, 0, 1) @ bands
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


def sdr(truth: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Return MARBLE-Benchmark's GlobalSDR of a song, dB [M] of [M, N]; NaN for a silent source."""
    energy = np.square(truth, dtype=np.float64).sum(1)
    error = np.square(truth - estimate, dtype=np.float64).sum(1)
    return np.where(energy > SILENT, 10 * np.log10((energy + 1e-7) / (error + 1e-7)), np.nan)


def museval_sdr(truth: np.ndarray, estimate: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return museval's SDR (BSS Eval v4, the median of seconds), dB [M] of [M, N]; NaN as `sdr`."""
    bss_eval = scores.needed("museval.metrics").bss_eval
    rows = np.flatnonzero(np.square(truth).sum(1) > SILENT)
    medians = np.full(len(truth), np.nan)
    if len(rows):
        # the rest of the last second has no frame
        second = dict(window=sample_rate, hop=sample_rate)
        frames = bss_eval(truth[rows, :, None], estimate[rows, :, None], **second)[0]
        known = ~np.isnan(frames).all(1)
        medians[rows[known]] = np.nanmedian(frames[known], 1)
    return medians


def separate(mixture: np.ndarray, masks: np.ndarray, bands: np.ndarray, hop: int) -> np.ndarray:
    """Return waves f32 [M, N] from a mixture [N] and masks [T, M, K]; the last mask is extended."""
    mixed = librosa.stft(mixture, n_fft=N_FFT, hop_length=hop)
    at = np.minimum(np.arange(mixed.shape[-1]), len(masks) - 1)
    gains = np.einsum("tmk,fk->mft", masks[at], bands)
    return librosa.istft(gains * mixed[None], n_fft=N_FFT, hop_length=hop, length=len(mixture))


def _load_shares(table: Frames, i: int, bands: np.ndarray, hop: int) -> dict[str, np.ndarray]:
    """Return the mixture's energy f32 [T, K] and the masks float16 [T, M, K], stored at first."""
    path = f"{table.paths[i]}.shares{BANDS}.npy"
    if not os.path.exists(path):
        cache.save(path, shares(table.waves(i), bands, hop).astype(np.float16))
    stored = np.load(path, mmap_mode="r")
    return {"energy": np.square(stored[:, 0], dtype=np.float32), "masks": stored[:, 1:]}


def probe(task: Task, splits: dict[str, Frames], settings: HeadSettings, names: list[str]) -> dict:
    """Train, choose rates by the loss and the layer by validation songs, and score the test songs.

    "sdr" is the mean over songs and sources, "sdr_museval" the median over songs of each source,
    and the mean of those.
    """
    train, sources = splits["train"], len(task.labels)
    hop, bands = round(train.sample_rate / train.frame_rate), filters(train.sample_rate)
    for table in splits.values():
        for i in range(len(table.clips)):
            _load_shares(table, i, bands, hop)  # computes what is not yet stored
    some = range(0, len(train.clips), -(-len(train.clips) // 200))
    energies = [_load_shares(train, i, bands, hop)["energy"].mean() for i in some]
    level = max(float(np.mean(energies)), 1e-12)

    def targets(table: Frames, i: int) -> dict[str, np.ndarray]:
        target = _load_shares(table, i, bands, hop)
        return target | {"energy": target["energy"] / level}

    objective = objectives.Objective(sources * BANDS, loss)
    fitted, rate_of = sampling.fit(splits, targets, objective, settings)

    def estimates(table: Frames, i: int, choice: int) -> Iterator[np.ndarray]:
        """Yield the sources of a clip, [M, N], that each seed estimates."""
        mixture, x = table.waves(i)[0], table.features(i).swapaxes(0, 1)
        logits = head.predict(fitted, x, choice, rate_of[choice])
        for row in logits.reshape(*logits.shape[:2], sources, BANDS):
            yield separate(mixture, scipy.special.softmax(row, 1), bands, hop)

    def score(metric: Callable, split: str, choice: int) -> np.ndarray:
        return _score_songs(metric, splits[split], functools.partial(estimates, choice=choice))

    def mean_sdr(split: str, choice: int) -> list[dict[str, float]]:
        return [{"sdr": float(x)} for x in np.nanmean(score(sdr, split, choice), (0, 2))]

    row = selection.select(names, settings.rates, rate_of, mean_sdr)
    metric = functools.partial(museval_sdr, sample_rate=train.sample_rate)
    slow = _by_source(score(metric, "test", names.index(row["layer"])), task.labels)
    row["metrics"] |= {name: selection.spread(values) for name, values in slow.items()}
    return row


def chance(task: Task, splits: dict[str, Frames]) -> dict[str, float]:
    """Return the scores of an equal share of the mixture for each source."""
    table, sources = splits["test"], len(task.labels)

    def equal(table: Frames, i: int) -> list[np.ndarray]:
        return [np.repeat(table.waves(i)[:1] / sources, sources, 0)]

    metric = functools.partial(museval_sdr, sample_rate=table.sample_rate)
    by_source = _by_source(_score_songs(metric, table, equal), task.labels)
    mean = float(np.nanmean(_score_songs(sdr, table, equal)))
    return {"sdr": mean} | {name: x[0] for name, x in by_source.items()}


def _score_songs(
    metric: Callable, table: Frames, estimates: Callable[[Frames, int], Iterable[np.ndarray]]
) -> np.ndarray:
    """Return a metric of each song, seed and source [songs, S, M]; `estimates` are S [M, N]."""
    songs: dict[str, list[int]] = {}
    for i, clip in enumerate(table.clips):
        songs.setdefault(clip.group or str(i), []).append(i)
    rows = []
    for clips in songs.values():
        truth = np.concatenate([table.waves(i)[1:] for i in clips], -1)
        by_seed = zip(*(estimates(table, i) for i in clips), strict=True)
        rows.append([metric(truth, np.concatenate(parts, -1)) for parts in by_seed])
    return np.array(rows)


def _by_source(rows: np.ndarray, labels: Sequence[str]) -> dict[str, list[float]]:
    """Return each source's median over songs of `rows` [songs, S, M], and their mean."""
    each = np.nanmedian(rows, 0)
    means = {"sdr_museval": each.mean(1).tolist()}
    return means | {f"sdr_museval_{name}": each[:, m].tolist() for m, name in enumerate(labels)}
