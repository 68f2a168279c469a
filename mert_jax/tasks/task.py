"""Tasks of music understanding: their clips, labels and metrics. One small module a dataset.

Folders and jsonl files are those of MARBLE (arXiv 2306.10548; a43992899/MARBLE, its
`marble/tasks/*/datamodule.py`, and for what that has not taken over a43992899/MARBLE-Benchmark).
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import soundfile

from mert_jax.errors import UserError

SPLITS = ("train", "valid", "test")
KINDS = ("classes", "key", "tags", "regression", "beats", "separation")
KEEP = 0.8  # fraction of a clip that the rest of a file must have to count, as in MARBLE


class Clip(NamedTuple):
    """A part of an audio file, from `start` for `seconds` (None: to the end), and its label.

    label: a class index ("classes", "key"), a tuple of tag indices ("tags"), of floats
        ("regression") or of beat times in seconds from the clip's start ("beats"), or the paths of
        the stems ("separation")
    group: names the recording whose clips' predictions are averaged; "" for a single clip
    """

    path: str
    start: float = 0.0
    seconds: float | None = None
    label: Any = None
    group: str = ""


class Task(NamedTuple):
    """A labelled dataset, as a probe uses it.

    kind: one of KINDS
    metrics: names of scores; the first selects the head
    clips: data folder -> clips of "train", "valid" and "test"; raises UserError for missing data
    seconds: length of clips that files are cut to, 0 for whole files
    source: where to get the data
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    clips: Callable[[str], dict[str, list[Clip]]]
    seconds: float
    licence: str
    source: str
    paper: str


def class_of(labels: Sequence[str]) -> Callable[[str], int]:
    """Return a function from a name to its index."""
    return {name: i for i, name in enumerate(labels)}.__getitem__


def tags_of(labels: Sequence[str]) -> Callable[[Sequence[str]], tuple[int, ...]]:
    """Return a function from a list of names to their indices."""
    index = {name: i for i, name in enumerate(labels)}
    return lambda names: tuple(index[name] for name in names)


def from_jsonl(
    data: str,
    name: str,
    label: Callable[[Any], Any],
    seconds: float,
    source: str,
    group: str = "audio_path",
    beats: bool = False,
) -> dict[str, list[Clip]]:
    """Read the clips of DATA/NAME.train.jsonl, .val.jsonl and .test.jsonl, MARBLE's tables.

    A row has `audio_path`, `label` and, to save reading the audio's header, `duration` or
    `num_samples` and `sample_rate`. Files are cut to clips of `seconds` (0: one clip); clips with
    the same value in the column `group` belong together. `label` converts a row's label; `beats`
    are cut to each clip. Raises UserError for a missing table, column or label.
    """
    find, splits = finder(data), {}
    for split, suffix in zip(SPLITS, ("train", "val", "test"), strict=True):
        path = os.path.join(data, f"{name}.{suffix}.jsonl")
        splits[split] = []
        for number, line in enumerate(lines(path, source), 1):
            try:
                row = json.loads(line)
                value, audio = label(row["label"]), find(row["audio_path"])
                member = str(row.get(group, row["audio_path"]))
            except (KeyError, TypeError, ValueError) as e:
                raise UserError(
                    f"{path}, line {number}: {type(e).__name__} {e}; a row has audio_path and a "
                    "label of this task"
                ) from e
            for start, length in cut(audio, duration(row), seconds):
                own = within(value, start, length) if beats else value
                splits[split].append(Clip(audio, start, length, own, member))
    return splits


def lines(path: str, source: str) -> Iterator[str]:
    """Yield the lines of a text file that are not empty. Raises UserError if it is missing."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there. {source}")
    with open(path, encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file if line.strip())


def finder(data: str) -> Callable[[str], str]:
    """Return a function from the audio path of a table to the file.

    Absolute paths stay; of others, as many leading folders as necessary are dropped to find the
    file in `data` (tables say "data/GTZAN/genres/...").
    """
    before = [0]  # folders dropped from the last path, most likely the number of the next one

    def find(path: str) -> str:
        if os.path.isabs(path):
            return path
        parts = path.split("/")
        for skipped in dict.fromkeys((*before, *range(len(parts)))):
            candidate = os.path.join(data, *parts[skipped:])
            if skipped < len(parts) and os.path.exists(candidate):
                before[0] = skipped
                return candidate
        return os.path.join(data, *parts[2 if parts[0] == "data" else 0 :])

    return find


def duration(row: dict[str, Any]) -> float | None:
    """Return the seconds of a row's audio, None if it does not say."""
    if row.get("num_samples") and row.get("sample_rate"):
        return row["num_samples"] / row["sample_rate"]
    return row.get("duration")


def cut(path: str, length: float | None, seconds: float) -> list[tuple[float, float | None]]:
    """Return start and length of the clips of `seconds` in a file of `length` seconds.

    The rest of the file is a clip if it has KEEP of one, or if there is no other. With 0 seconds,
    the clip is the whole file.
    """
    if not seconds:
        return [(0.0, None)]
    if length is None:
        try:
            header = soundfile.info(path)
        except (OSError, RuntimeError):  # decoding will report it
            return [(0.0, seconds)]
        length = header.frames / header.samplerate
    count = int(length / seconds + 1 - KEEP + 1e-6)
    return [(i * seconds, seconds) for i in range(max(1, count))]


def within(times: Sequence[float], start: float, length: float | None) -> tuple[float, ...]:
    """Return the `times` within a clip, in seconds from its start."""
    stop = float("inf") if length is None else start + length
    return tuple(t - start for t in times if start <= t < stop)


def folder(path: str, source: str) -> str:
    """Return `path`. Raises UserError with `source` if it is not a folder."""
    if not os.path.isdir(path):
        raise UserError(f"{path} is not there. {source}")
    return path
