"""Beat tracking: a head predicts the beat frames, and a decoder turns them into times."""

from collections.abc import Sequence

import librosa
import numpy as np
import scipy.signal

from mert_jax.probing import head, objectives, sampling, scores, selection
from mert_jax.probing.cache import Frames
from mert_jax.probing.head import HeadSettings
from mert_jax.tasks.task import Task

# targets around a beat, as in MARBLE v2 (`num_neighbors: 2`): annotations are not frame-exact
WIDTHS = (0.25, 0.5, 1.0, 0.5, 0.25)
SHORTEST = 0.2  # seconds between picked beats: 300 a minute
# peaks above a threshold, or Ellis's dynamic programming (2007), which assumes a tempo
DECODERS = (0.1, 0.2, 0.3, 0.4, 0.5, "dynamic")
TOLERANCES = {"f_measure": 0.07, "f_measure_20ms": 0.02}


def targets(times: Sequence[float], size: int, frame_rate: float) -> np.ndarray:
    """Return f32 [T frames, 1]: 1 in the frame of a beat, less in its neighbours."""
    exact = np.zeros(size + 4, np.float32)
    at = np.rint(np.array(times, float) * frame_rate).astype(int)
    exact[at[at < size] + 2] = 1
    near = [height * np.roll(exact, shift - 2) for shift, height in enumerate(WIDTHS)]
    return np.max(near, 0)[2 : size + 2, None]


def decode(activation: np.ndarray, frame_rate: float, how: float | str) -> np.ndarray:
    """Return beat times in seconds from probabilities [T], by one of DECODERS."""
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

    They are means over clips with beats; `f_measure_pooled` counts all beats together, as MARBLE.
    """
    match = scores.needed("mir_eval.util").match_events
    pairs = [(np.array(times), guess) for times, guess in zip(truth, guesses, strict=True)]
    sizes = np.array([len(times) + len(guess) for times, guess in pairs])
    counted = np.array([len(times) > 0 for times, _ in pairs])
    matched, means = {}, {}
    for name, tolerance in TOLERANCES.items():
        matches = [match(*pair, tolerance) if all(map(len, pair)) else () for pair in pairs]
        matched[name] = np.array([2 * len(x) for x in matches])
        each = matched[name][counted] / sizes[counted]
        means[name] = float(each.mean()) if len(each) else float("nan")
    return means | {"f_measure_pooled": float(matched["f_measure"].sum() / max(1, sizes.sum()))}


def probe(task: Task, splits: dict[str, Frames], settings: HeadSettings, names: list[str]) -> dict:
    """Train, select layer and decoder on validation, and score the test split.

    The learning rate is selected by the loss of validation frames, because decoding is slow.
    """

    def targets_of(table: Frames, i: int) -> np.ndarray:
        return targets(table.clips[i].label, table.features(i).shape[1], table.frame_rate)

    objective = objectives.Objective(1, objectives.binary)
    fitted, rate_of = sampling.fit(splits, targets_of, objective, settings)

    def activations(split: str, choice: int) -> list[np.ndarray]:
        """Return probabilities [seeds, T] of each clip."""
        table = splits[split]
        rows = (table.features(i).swapaxes(0, 1) for i in range(len(table.clips)))
        logits = (head.predict(fitted, x, choice, rate_of[choice])[..., 0] for x in rows)
        return [1 / (1 + np.exp(-x)) for x in logits]

    def decode_all(split: str, clips: list[np.ndarray], how: float | str) -> list[dict[str, float]]:
        truth, rate = [clip.label for clip in splits[split].clips], splits[split].frame_rate
        seeds = range(settings.seeds)
        return [score([decode(x[seed], rate, how) for x in clips], truth) for seed in seeds]

    decoder_of = []
    for choice in range(len(names)):
        clips = activations("valid", choice)
        tried = [decode_all("valid", clips, how) for how in DECODERS]
        means = [np.mean([row[task.metrics[0]] for row in rows]) for rows in tried]
        decoder_of.append(DECODERS[selection.best(np.array(means))])

    def score_split(split: str, choice: int) -> list[dict[str, float]]:
        return decode_all(split, activations(split, choice), decoder_of[choice])

    row = selection.select(names, settings.rates, rate_of, score_split)
    return row | {"decoder": decoder_of[names.index(row["layer"])]}


def chance(task: Task, splits: dict[str, Frames]) -> dict[str, float]:
    """Return the scores of beats at the median distance of the training beats."""
    gaps = [np.diff(clip.label) for clip in splits["train"].clips if len(clip.label) > 1]
    gap = float(np.median(np.concatenate(gaps))) if gaps else 0.5
    test = splits["test"]
    lengths = [test.features(i).shape[1] / test.frame_rate for i in range(len(test.clips))]
    guesses = [np.arange(0, length, gap) for length in lengths]
    return score(guesses, [clip.label for clip in test.clips])
