"""Tasks of music understanding: which clips, which labels, which scores. One small file a dataset.

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
KEEP = 0.8  # of a clip's length that the rest of a file must have to be a clip, as in MARBLE


class Clip(NamedTuple):
    """A part of an audio file, from `start` on for `seconds` (None: to the end), and its label.

    label: a class index ("classes", "key"), a tuple of tag indices ("tags"), of floats
    ("regression") or of beat times in seconds from the clip's start ("beats"), or a dict of the
    stems' paths ("separation"). group: clips of one recording, whose predictions are averaged
    before they are scored; "" is a clip alone.
    """

    path: str
    start: float = 0.0
    seconds: float | None = None
    label: Any = None
    group: str = ""


class Task(NamedTuple):
    """What a probe needs to know of a dataset.

    kind: of KINDS. metrics: names of `mert_jax.probing.scores`, the first is selected on. clips:
    data folder -> clips of "train", "valid" and "test"; raises UserError where one is not there.
    seconds: length that files are cut to, 0: they are left whole. source: how to get the data.
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
    """A reader of a row's label: the index of a name."""
    return {name: i for i, name in enumerate(labels)}.__getitem__


def tags_of(labels: Sequence[str]) -> Callable[[Sequence[str]], tuple[int, ...]]:
    """A reader of a row's label: the indices of a list of names."""
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
    """The clips of DATA/NAME.train.jsonl, .val.jsonl and .test.jsonl, MARBLE's tables.

    A row has `audio_path`, `label` and, if its audio's header shall not be looked at, `duration`
    or `num_samples` and `sample_rate`. Files are cut to clips of `seconds` (0: one clip), of which
    those with one value in the column `group` belong together. `label` reads a row's label; of
    `beats` each clip has its own, from its start on. Raises UserError for a table that is not
    there, a row without these columns, or a label that the task does not have.
    """
    find, found = finder(data), {}
    for split, suffix in zip(SPLITS, ("train", "val", "test"), strict=True):
        path = os.path.join(data, f"{name}.{suffix}.jsonl")
        found[split] = []
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
                found[split].append(Clip(audio, start, length, own, member))
    return found


def lines(path: str, source: str) -> Iterator[str]:
    """The lines of a text file that are not empty; UserError with `source` where it is missing."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there. {source}")
    with open(path, encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file if line.strip())


def finder(data: str) -> Callable[[str], str]:
    """A function from a table's audio path to where the file is: as it stands, or below `data` with
    as many of its first folders left out as need be (tables say "data/GTZAN/genres/...")."""
    before = [0]  # folders that were left out of the last path: most likely again the right number

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
    """Seconds of a row's audio, None where it does not say."""
    if row.get("num_samples") and row.get("sample_rate"):
        return row["num_samples"] / row["sample_rate"]
    return row.get("duration")


def cut(path: str, length: float | None, seconds: float) -> list[tuple[float, float | None]]:
    """Start and length of the clips of `seconds` in a file of `length` seconds, side by side; the
    rest is one too if it has KEEP of a clip, or is all there is (0 seconds: the whole file)."""
    if not seconds:
        return [(0.0, None)]
    if length is None:
        try:
            header = soundfile.info(path)
        except (OSError, RuntimeError):  # decoding it will say what is wrong
            return [(0.0, seconds)]
        length = header.frames / header.samplerate
    count = int(length / seconds + 1 - KEEP + 1e-6)
    return [(i * seconds, seconds) for i in range(max(1, count))]


def within(times: Sequence[float], start: float, length: float | None) -> tuple[float, ...]:
    """Those of `times` that lie in a clip, as seconds from its start."""
    stop = float("inf") if length is None else start + length
    return tuple(t - start for t in times if start <= t < stop)


def folder(path: str, source: str) -> str:
    """`path`; UserError with `source` where it is not a folder."""
    if not os.path.isdir(path):
        raise UserError(f"{path} is not there. {source}")
    return path
