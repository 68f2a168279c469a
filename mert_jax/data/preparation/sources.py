"""Finds the audio files of a dataset, and records the outcome of decoding each."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mert_jax.data.decoding import is_audio_name
from mert_jax.errors import UserError


class SourceFile(NamedTuple):
    """A file to decode; `name` is relative to the input, size and time tell if it changed."""

    path: str
    name: str
    size: int
    mtime_ns: int


class Outcome(NamedTuple):
    """Outcome of decoding a file: a track, or the reason why the file is skipped."""

    track: str = ""
    samples: int = 0
    clipped: int = 0
    sample_rate: int = 0
    channels: int = 0
    format: str = ""
    reason: str = ""
    detail: str = ""


class SourceList(NamedTuple):
    """Files to decode sorted by name, and (name, reason, detail) of the others."""

    sources: list[SourceFile]
    left_out: list[tuple[str, str, str]]


def find_sources(inputs: Sequence[str], exclude: str) -> SourceList:
    """List the audio files in directories (nested) and files, except those under `exclude`.

    Raises UserError for a missing input, and if the inputs hold no file.
    """
    exclude = os.path.realpath(exclude)
    sources: dict[str, SourceFile] = {}
    left_out: dict[str, tuple[str, str, str]] = {}
    for argument in inputs:
        if not os.path.exists(argument):
            raise UserError(f"--input={argument} does not exist; give a directory or audio files")
        root = os.path.abspath(argument)
        if os.path.realpath(root) == exclude:
            raise UserError(f"--output={argument} is also an --input; write to another directory")
        is_file = not os.path.isdir(root)
        for path, error in [(root, "")] if is_file else _walk(root, exclude):
            name = _printable(os.path.basename(path) if is_file else os.path.relpath(path, root))
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
            elif is_file or is_audio_name(path):
                sources[real] = SourceFile(real, name, status.st_size, status.st_mtime_ns)
            else:
                suffix = os.path.splitext(path)[1].lower() or "no suffix"
                left_out[real] = (name, "not audio", suffix)
    if not sources and not left_out:
        raise UserError(f"no file in --input={','.join(inputs)}; give a directory with music in it")
    by_name = sorted(sources.values(), key=lambda source: (source.name, source.path))
    return SourceList(by_name, sorted(left_out.values()))


def _walk(root: str, exclude: str) -> Iterator[tuple[str, str]]:
    """Yield (file, "") below a directory, and (directory, error) for those that cannot be read."""
    seen = {os.path.realpath(root), exclude}
    errors: list[OSError] = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=errors.append):
        links = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders)}
        # a link may lead back up; os.walk enters the folders that are left in this list
        folders[:] = [name for name, real in links.items() if real not in seen]
        seen.update(links.values())
        yield from ((os.path.join(folder, name), "") for name in sorted(files))
    yield from ((e.filename, e.strerror) for e in errors)


def _printable(name: str) -> str:
    """Return a file name of any bytes as text that can be printed and stored."""
    return os.fsencode(name).decode("utf-8", "replace")


def to_line(source: SourceFile, outcome: Outcome) -> str:
    """Return the line of a journal for a file."""
    return json.dumps(source._asdict() | outcome._asdict()) + "\n"


def read_lines(path: str) -> Iterator[tuple[SourceFile, Outcome]]:
    """Yield the files and outcomes of a journal, nothing if there is none.

    Lines that a killed run left incomplete are skipped: their files are decoded again.
    """
    if not os.path.exists(path):
        return
    with open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                fields = json.loads(line)
                source = SourceFile(*(fields.pop(key) for key in SourceFile._fields))
                yield source, Outcome(**fields)
