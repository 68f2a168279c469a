"""Tasks of music understanding: their clips, labels and metrics.

Folders and jsonl files are those of MARBLE (arXiv 2306.10548; a43992899/MARBLE, its
`marble/tasks/*/datamodule.py`, and for what that has not taken over a43992899/MARBLE-Benchmark).
"""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import soundfile

from mert_jax.errors import UserError

SPLITS = ("train", "valid", "test")
METRICS = {  # of each kind of task
    "classes": ("accuracy",),
    "key": ("weighted_score", "accuracy"),
    "tags": ("roc_auc", "average_precision"),
    "regression": ("r2",),  # and r2_LABEL of each label
    "beats": ("f_measure", "f_measure_20ms", "f_measure_pooled"),
    "separation": ("sdr", "sdr_museval"),
}


class Clip(NamedTuple):
    """A part of an audio file and its label.

    That is a class index ("classes", "key"), a tuple of tag indices ("tags"), of floats
    ("regression") or of beat times in seconds from the clip's start ("beats"), or the paths of the
    stems by name ("separation").
    """

    path: str
    start: float = 0.0
    seconds: float | None = None  # None: to the end
    label: Any = None
    group: str = ""  # the recording over whose clips predictions are averaged, "" for a single clip


class Task(NamedTuple):
    """A labelled dataset, as a probe uses it."""

    name: str
    kind: str  # a key of METRICS
    labels: tuple[str, ...]
    # data folder -> clips of each split; raises UserError for missing data
    clips: Callable[[str], dict[str, list[Clip]]]
    licence: str
    source: str  # where to get the data
    paper: str
    seconds: float = 0.0  # of the clips that files are cut to, 0 for whole files

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of scores; the first selects the head."""
        each = tuple(f"r2_{label}" for label in self.labels) if self.kind == "regression" else ()
        return METRICS[self.kind] + each


def jsonl_task(
    name: str, kind: str, labels: tuple[str, ...], seconds: float, group: str = "", **about: str
) -> Task:
    """Return a task of MARBLE's tables DATA/NAME.train.jsonl, .val.jsonl and .test.jsonl.

    A row has `audio_path`, `label`, the recording that a clip belongs to in the column `group`, and
    `duration` or `num_samples` and `sample_rate`, which save reading the audio's header. `about`
    are the fields `licence`, `source` and `paper` of `Task`.
    """
    index = {label: i for i, label in enumerate(labels)}

    def read_label(label: Any) -> Any:
        if kind == "regression":
            return tuple(float(value) for value, _ in zip(label, labels, strict=True))
        if kind == "beats":
            return tuple(map(float, label["beat"]))
        return tuple(index[tag] for tag in label) if kind == "tags" else index[label]

    def read_row(data: str, row: dict[str, Any]) -> list[Clip]:
        label, audio = read_label(row["label"]), find_audio(data, row["audio_path"])
        recording, clips = str(row.get(group, row["audio_path"])), []
        known = row.get("num_samples") and row.get("sample_rate")
        length = row["num_samples"] / row["sample_rate"] if known else row.get("duration")
        for start in cut(audio, seconds, length):
            own = label
            if kind == "beats":
                own = tuple(t - start for t in label if start <= t < start + seconds)
            clips.append(Clip(audio, start, seconds or None, own, recording))
        return clips

    def clips(data: str) -> dict[str, list[Clip]]:
        splits = {split: [] for split in SPLITS}
        for split, suffix in zip(SPLITS, ("train", "val", "test"), strict=True):
            path = os.path.join(data, f"{name}.{suffix}.jsonl")
            for number, line in enumerate(lines(path, about["source"]), 1):
                try:
                    splits[split] += read_row(data, json.loads(line))
                except (KeyError, TypeError, ValueError) as e:
                    problem = f"{path}, line {number}: {type(e).__name__} {e}"
                    way_out = "a row has audio_path and a label of this task"
                    raise UserError(f"{problem}; {way_out}") from e
        return splits

    return Task(name, kind, labels, clips, seconds=seconds, **about)


def existing(path: str, source: str) -> str:
    """Return `path`; raises UserError with `source` if it is missing."""
    if not os.path.exists(path):
        raise UserError(f"{path} is not there. {source}")
    return path


def lines(path: str, source: str) -> list[str]:
    """Return the lines of a text file that are not empty."""
    with open(existing(path, source), encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file if line.strip()]


def find_audio(data: str, path: str) -> str:
    """Return the longest end of `path` that is in `data`: tables say "data/GTZAN/genres/..."."""
    parts = path.split("/")
    ends = [os.path.join(data, *parts[i:]) for i in range(len(parts))]
    missing = os.path.join(data, *parts[2 if parts[0] == "data" else 0 :])
    return path if os.path.isabs(path) else next(filter(os.path.exists, ends), missing)


def cut(path: str, seconds: float, length: float | None = None, keep: float = 0.8) -> list[float]:
    """Return the starts of the clips of `seconds` in a file of `length` seconds; [0] for 0 seconds.

    The rest counts if it has the fraction `keep` of a clip (MARBLE's), or if it is the only one.
    """
    if not seconds:
        return [0.0]
    if length is None:
        try:
            length = soundfile.info(path).duration
        except (OSError, RuntimeError):  # decoding will report it
            return [0.0]
    return [i * seconds for i in range(max(1, int(length / seconds + 1 - keep + 1e-6)))]
