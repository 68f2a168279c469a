"""Beats: a head tells of each frame whether it is one, and a decoder makes times of that.

Shapes: T frames, S seeds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.signal

from mert_jax.probing import head, objectives, sampling, scores, selection
from mert_jax.probing.cache import Frames
from mert_jax.tasks.task import Task

# around a beat, as MARBLE v2 widens them (`num_neighbors: 2`): annotations are not frame-exact
WIDTHS = (0.25, 0.5, 1.0, 0.5, 0.25)
SHORTEST = 0.2  # seconds between beats that are picked one by one: 300 a minute
# of the decoders: peaks above a threshold, or Ellis's dynamic programme, which assumes a tempo
DECODERS = (0.1, 0.2, 0.3, 0.4, 0.5, "dynamic")
TOLERANCES = {"f_measure": 0.07, "f_measure_20ms": 0.02}


def targets(times: Sequence[float], size: int, frame_rate: float) -> np.ndarray:
    """f32[T, 1]: 1 in the frame of a beat, less in its neighbours."""
    exact = np.zeros(size + 4, np.float32)
    found = exact.copy()
    at = np.rint(np.array(times, float) * frame_rate).astype(int)
    exact[at[at < size] + 2] = 1
    for shift, height in enumerate(WIDTHS):
        found = np.maximum(found, height * np.roll(exact, shift - 2))
    return found[2 : size + 2, None]


def decode(activation: np.ndarray, frame_rate: float, how: float | str) -> np.ndarray:
    """Beat times in seconds of probabilities [T]: peaks above the threshold `how`, or "dynamic"
    (librosa.beat.beat_track; Ellis, 2007)."""
    if how == "dynamic":
        import librosa

        at = librosa.beat.beat_track(
            onset_envelope=activation, sr=frame_rate, hop_length=1, trim=False
        )[1]
    else:
        distance = max(1, round(SHORTEST * frame_rate))
        at = scipy.signal.find_peaks(activation, height=how, distance=distance)[0]
    return at / frame_rate


def score(found: Sequence[np.ndarray], truth: Sequence[Sequence[float]]) -> dict[str, float]:
    """F-measures of beats within 70 ms (what MARBLE's code and mir_eval have) and 20 ms: means over
    clips that have beats; `f_measure_pooled` of all beats together, as MARBLE counts them."""
    matching = scores.needed("mir_eval.util").match_events
    made, together = {}, [0, 0]
    for name, tolerance in TOLERANCES.items():
        each = []
        for guess, times in zip(found, truth, strict=True):
            size = len(guess) + len(times)
            hits = len(matching(np.array(times), guess, tolerance)) if len(guess) and times else 0
            if times:
                each.append(2 * hits / size)
            if name == "f_measure":
                together = [together[0] + 2 * hits, together[1] + size]
        made[name] = float(np.mean(each)) if each else float("nan")
    return made | {"f_measure_pooled": together[0] / max(1, together[1])}


def probe(
    task: Task,
    splits: dict[str, Frames],
    settings: head.HeadSettings,
    names: list[str],
    tick: Callable[[], Any],
) -> selection.Row:
    """Train, choose layer and decoder on validation and score the test split.

    The learning rate is chosen by the loss of validation frames: decoding is slow.
    """

    def wanted(split: str) -> Callable[[int], np.ndarray]:
        held = splits[split]
        rate, size = held.frame_rate, lambda i: held.features(i).shape[1]
        return lambda i: targets(held.clips[i].label, size(i), rate)

    fitted = head.fit(
        lambda epoch: sampling.draw(splits["train"], wanted("train"), sampling.TRAIN, epoch),
        sampling.draw(splits["valid"], wanted("valid"), sampling.VALID, 0),
        objectives.tags(1),
        settings._replace(batch_size=8 * settings.batch_size),
        tick,
    )
    rate_of = np.nan_to_num(fitted.quality.mean(0), nan=-np.inf).argmax(0)  # [Q]

    def activations(split: str, choice: int) -> list[np.ndarray]:
        """[S, T] of each clip."""
        held = splits[split]
        rows = (held.features(i).swapaxes(0, 1) for i in range(len(held.clips)))
        logits = (head.predict(fitted, x, choice, rate_of[choice])[..., 0] for x in rows)
        return [1 / (1 + np.exp(-x)) for x in logits]

    def scored(split: str, found: list[np.ndarray], how: float | str) -> list[dict[str, float]]:
        truth = [clip.label for clip in splits[split].clips]
        rate = splits[split].frame_rate
        guess = lambda seed: [decode(x[seed], rate, how) for x in found]
        return [score(guess(seed), truth) for seed in range(settings.seeds)]

    valid = np.full((len(names), len(settings.rates), settings.seeds), np.nan)
    decoder_of = []
    for choice in range(len(names)):
        found = activations("valid", choice)
        rows = [[row[task.metrics[0]] for row in scored("valid", found, how)] for how in DECODERS]
        best = int(np.nan_to_num(np.mean(rows, 1), nan=-1).argmax())
        decoder_of.append(DECODERS[best])
        valid[choice, rate_of[choice]] = rows[best]

    def test(choice: int, rate: int) -> dict[str, list[float]]:
        rows = scored("test", activations("test", choice), decoder_of[choice])
        return {name: [row[name] for row in rows] for name in task.metrics}

    row = selection.select(valid, names, settings.rates, task.metrics, test)
    return row | {"decoder": decoder_of[names.index(row["layer"])]}


def chance(task: Task, splits: dict[str, Frames]) -> dict[str, float]:
    """The score of beats at the median distance of the training beats, from the clip's start on."""
    gaps = [np.diff(clip.label) for clip in splits["train"].clips if len(clip.label) > 1]
    gap = float(np.median(np.concatenate(gaps))) if gaps else 0.5
    test = splits["test"]
    lengths = [test.features(i).shape[1] / test.frame_rate for i in range(len(test.clips))]
    found = score(
        [np.arange(0, length, gap) for length in lengths], [clip.label for clip in test.clips]
    )
    return {name: found[name] for name in task.metrics}
