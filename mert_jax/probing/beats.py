"""Beat tracking: a head predicts the beat frames, and a decoder turns them into times.

Shapes: T frames, S seeds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import librosa
import numpy as np
import scipy.signal

from mert_jax.probing import head, objectives, sampling, scores, selection
from mert_jax.probing.cache import Frames
from mert_jax.tasks.task import Task

# targets around a beat, as in MARBLE v2 (`num_neighbors: 2`): annotations are not frame-exact
WIDTHS = (0.25, 0.5, 1.0, 0.5, 0.25)
SHORTEST = 0.2  # seconds between picked beats: 300 a minute
# decoders: peaks above a threshold, or Ellis's dynamic programming, which assumes a tempo
DECODERS = (0.1, 0.2, 0.3, 0.4, 0.5, "dynamic")
TOLERANCES = {"f_measure": 0.07, "f_measure_20ms": 0.02}


def targets(times: Sequence[float], size: int, frame_rate: float) -> np.ndarray:
    """Return f32 [T, 1]: 1 in the frame of a beat, less in its neighbours."""
    exact = np.zeros(size + 4, np.float32)
    near = exact.copy()
    at = np.rint(np.array(times, float) * frame_rate).astype(int)
    exact[at[at < size] + 2] = 1
    for shift, height in enumerate(WIDTHS):
        near = np.maximum(near, height * np.roll(exact, shift - 2))
    return near[2 : size + 2, None]


def decode(activation: np.ndarray, frame_rate: float, how: float | str) -> np.ndarray:
    """Return beat times in seconds from probabilities [T].

    `how` is a threshold of peaks, or "dynamic" (librosa.beat.beat_track; Ellis, 2007).
    """
    if how == "dynamic":
        at = librosa.beat.beat_track(
            onset_envelope=activation, sr=frame_rate, hop_length=1, trim=False
        )[1]
    else:
        distance = max(1, round(SHORTEST * frame_rate))
        at = scipy.signal.find_peaks(activation, height=how, distance=distance)[0]
    return at / frame_rate


def score(guesses: Sequence[np.ndarray], truth: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return F-measures of beats within 70 ms (as MARBLE and mir_eval) and 20 ms.

    They are means over clips that have beats; `f_measure_pooled` counts all beats together, as
    MARBLE does.
    """
    matching = scores.needed("mir_eval.util").match_events
    means, together = {}, [0, 0]
    for name, tolerance in TOLERANCES.items():
        each = []
        for guess, times in zip(guesses, truth, strict=True):
            size = len(guess) + len(times)
            hits = len(matching(np.array(times), guess, tolerance)) if len(guess) and times else 0
            if times:
                each.append(2 * hits / size)
            if name == "f_measure":
                together = [together[0] + 2 * hits, together[1] + size]
        means[name] = float(np.mean(each)) if each else float("nan")
    return means | {"f_measure_pooled": together[0] / max(1, together[1])}


def probe(
    task: Task,
    splits: dict[str, Frames],
    settings: head.HeadSettings,
    names: list[str],
    tick: Callable[[], Any],
) -> selection.Row:
    """Train, select layer and decoder on validation, and score the test split.

    The learning rate is selected by the loss of validation frames, because decoding is slow.
    """

    def targets_of(split: str) -> Callable[[int], np.ndarray]:
        table = splits[split]
        return lambda i: targets(table.clips[i].label, table.features(i).shape[1], table.frame_rate)

    fitted = head.fit(
        lambda epoch: sampling.draw(splits["train"], targets_of("train"), sampling.TRAIN, epoch),
        sampling.draw(splits["valid"], targets_of("valid"), sampling.VALID, 0),
        objectives.tags(1),
        settings._replace(batch_size=8 * settings.batch_size),
        tick,
    )
    rate_of = np.nan_to_num(fitted.quality.mean(0), nan=-np.inf).argmax(0)  # [Q]

    def activations(split: str, choice: int) -> list[np.ndarray]:
        """Return probabilities [S, T] of each clip."""
        table = splits[split]
        rows = (table.features(i).swapaxes(0, 1) for i in range(len(table.clips)))
        logits = (head.predict(fitted, x, choice, rate_of[choice])[..., 0] for x in rows)
        return [1 / (1 + np.exp(-x)) for x in logits]

    def scored(
        split: str, activations: list[np.ndarray], how: float | str
    ) -> list[dict[str, float]]:
        truth = [clip.label for clip in splits[split].clips]
        rate = splits[split].frame_rate
        return [
            score([decode(x[seed], rate, how) for x in activations], truth)
            for seed in range(settings.seeds)
        ]

    valid = np.full((len(names), len(settings.rates), settings.seeds), np.nan)
    decoder_of = []
    for choice in range(len(names)):
        valid_activations = activations("valid", choice)
        rows = [
            [row[task.metrics[0]] for row in scored("valid", valid_activations, how)]
            for how in DECODERS
        ]
        best = int(np.nan_to_num(np.mean(rows, 1), nan=-1).argmax())
        decoder_of.append(DECODERS[best])
        valid[choice, rate_of[choice]] = rows[best]

    def test(choice: int, rate: int) -> dict[str, list[float]]:
        rows = scored("test", activations("test", choice), decoder_of[choice])
        return {name: [row[name] for row in rows] for name in task.metrics}

    row = selection.select(valid, names, settings.rates, task.metrics, test)
    return row | {"decoder": decoder_of[names.index(row["layer"])]}


def chance(task: Task, splits: dict[str, Frames]) -> dict[str, float]:
    """Return the scores of beats at the median distance of the training beats."""
    gaps = [np.diff(clip.label) for clip in splits["train"].clips if len(clip.label) > 1]
    gap = float(np.median(np.concatenate(gaps))) if gaps else 0.5
    test = splits["test"]
    lengths = [test.features(i).shape[1] / test.frame_rate for i in range(len(test.clips))]
    means = score(
        [np.arange(0, length, gap) for length in lengths], [clip.label for clip in test.clips]
    )
    return {name: means[name] for name in task.metrics}
