"""The files a dataset is made from: finding them, and remembering what became of each."""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mert_jax.data.decoding import is_audio_name
from mert_jax.errors import UserError


class SourceFile(NamedTuple):
    """A file to decode: where it is, its name relative to the input, and how to see it changed."""

    path: str
    name: str
    size: int
    mtime_ns: int


class Outcome(NamedTuple):
    """What decoding a file gave: a track, or the reason why it is left out."""

    track: str = ""
    samples: int = 0
    clipped: int = 0
    sample_rate: int = 0
    channels: int = 0
    format: str = ""
    reason: str = ""
    detail: str = ""


class SourceList(NamedTuple):
    """Sources sorted by name, and (name, reason, detail) of what needs no decoding."""

    sources: list[SourceFile]
    left_out: list[tuple[str, str, str]]


def find_sources(inputs: Sequence[str], exclude: str) -> SourceList:
    """List the audio files in directories (nested) and files, without those under `exclude`.

    Raises `UserError` for an input that is missing, cannot be listed or holds no file.
    """
    exclude = os.path.realpath(exclude)
    sources: dict[str, SourceFile] = {}
    left_out: dict[str, tuple[str, str, str]] = {}
    files = 0
    for given in inputs:
        if not os.path.exists(given):
            raise UserError(f"--input={given} does not exist; give a directory or audio files")
        root = os.path.abspath(given)
        if os.path.realpath(root) == exclude:
            raise UserError(f"--output={given} is also an --input; write to another directory")
        alone = not os.path.isdir(root)
        for path, error in [(root, "")] if alone else _walk(root, exclude):
            files += not error
            name = printable(os.path.basename(path) if alone else os.path.relpath(path, root))
            real = os.path.realpath(path)
            if real in sources or real in left_out:
                continue  # reached twice, by overlapping inputs or links
            try:
                status = os.stat(path)
                if error:
                    raise OSError(0, error)
            except OSError as e:
                left_out[real] = (name, "unreadable", e.strerror)
                continue
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
                left_out[real] = (name, "unreadable", "not a regular file")
            elif alone or is_audio_name(path):
                sources[real] = SourceFile(real, name, status.st_size, status.st_mtime_ns)
            else:
                suffix = os.path.splitext(path)[1].lower() or "no suffix"
                left_out[real] = (name, "not audio", suffix)
    if not files and not left_out:
        raise UserError(f"no file in --input={','.join(inputs)}; give a directory with music in it")
    by_name = sorted(sources.values(), key=lambda source: (source.name, source.path))
    return SourceList(by_name, sorted(left_out.values()))


def _walk(root: str, exclude: str) -> Iterator[tuple[str, str]]:
    """Yield (file, "") below a directory, and (directory, error) for those that cannot be read."""
    seen = {os.path.realpath(root)}
    errors: list[OSError] = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=errors.append):
        inside = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if real != exclude and real not in seen:  # a link may lead back up
                seen.add(real)
                inside.append(name)
        folders[:] = inside
        yield from ((os.path.join(folder, name), "") for name in sorted(files))
    yield from ((e.filename, e.strerror) for e in errors)


def printable(name: str) -> str:
    """A file name as text that can be printed and stored, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "replace")


def to_line(source: SourceFile, outcome: Outcome) -> str:
    """One line of a journal of outcomes."""
    return json.dumps(source._asdict() | outcome._asdict()) + "\n"


def read_lines(path: str) -> Iterator[tuple[SourceFile, Outcome]]:
    """Read a journal of outcomes back; none where there is no such file.

    A line that was being written when the run was killed is left out: its file is decoded again.
    """
    if not os.path.exists(path):
        return
    with open(path) as file:
        for line in file:
            if line.isspace():
                continue
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            source = SourceFile(*(fields.pop(key) for key in SourceFile._fields))
            yield source, Outcome(**fields)
