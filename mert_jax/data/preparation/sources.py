"""Finds audio files, decodes each to OUTPUT/.staging, and keeps a journal of the outcomes.

A file of samples is named by the hash of its content, once it is complete.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mert_jax.constants import FULL_SCALE, SAMPLE_RATE
from mert_jax.data.decoding import SkippedFile, decode, is_audio_name, to_int16
from mert_jax.errors import UserError

JOURNAL = "journal.jsonl"
SILENCE_PEAK = 3  # -80 dBFS; a track that nowhere reaches it is silent, perhaps dithered


class SourceFile(NamedTuple):
    """A file to decode; `name` is relative to the input, size and time tell if it changed."""

    path: str
    name: str
    size: int
    mtime_ns: int


class Outcome(NamedTuple):
    """A decoded track, or the reason why a file is skipped."""

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
    """List the files in nested directories and of `inputs`, except under the output `exclude`."""
    exclude = os.path.realpath(exclude)
    sources: dict[str, SourceFile] = {}
    left_out: dict[str, tuple[str, str, str]] = {}
    for argument in inputs:
        if not os.path.exists(argument):
            raise UserError(f"--input={argument} does not exist; give a directory or audio files")
        root = os.path.abspath(argument)
        if os.path.realpath(root) == exclude:
            raise UserError(f"--output={argument} is also an --input; give another --output")
        is_file = not os.path.isdir(root)
        for path, error in [(root, "")] if is_file else _walk(root, exclude):
            real = os.path.realpath(path)
            if real in sources or real in left_out:
                continue  # reached twice, by overlapping inputs or links
            name = os.path.basename(path) if is_file else os.path.relpath(path, root)
            name = os.fsencode(name).decode("utf-8", "replace")  # can be printed and stored
            try:
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
                    error = error or "not a regular file"
            except OSError as e:
                error = e.strerror
            if error:
                left_out[real] = (name, "unreadable", error)
            elif is_file or is_audio_name(path):
                sources[real] = SourceFile(real, name, status.st_size, status.st_mtime_ns)
            else:
                suffix = os.path.splitext(path)[1].lower()
                left_out[real] = (name, "not audio", suffix or "no suffix")
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


def to_line(source: SourceFile, outcome: Outcome) -> str:
    """Return the line of a journal for a file."""
    return json.dumps(source._asdict() | outcome._asdict()) + "\n"


def read_lines(path: str) -> Iterator[tuple[SourceFile, Outcome]]:
    """Yield the files and outcomes of a journal, without lines that a killed run cut off."""
    lines = pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            fields = json.loads(line)
            source = SourceFile(*map(fields.pop, SourceFile._fields))
            yield source, Outcome(**fields)


def audio_path(staging: str, track: str) -> str:
    """Return the path of the samples of a decoded track."""
    return os.path.join(staging, "audio", track + ".s16le")


def stage(source: SourceFile, staging: str) -> Outcome:
    """Decode a file into the staging directory. Raises OSError if that cannot be written."""
    partial = os.path.join(staging, "partial", f"{os.getpid()}.s16le")
    try:
        return _stage(source.path, staging, partial)
    except SkippedFile as e:
        return Outcome(reason=e.reason, detail=e.detail)
    except OSError:
        raise  # of the staging directory: errors of the source are SkippedFile
    except Exception as e:  # a decoder may raise anything on a broken file: skip that file only
        return Outcome(reason="decoder failed", detail=f"{type(e).__name__}: {e}")
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


def _stage(path: str, staging: str, partial: str) -> Outcome:
    digest = hashlib.blake2b(digest_size=8)
    samples = clipped = peak = 0
    with decode(path) as (header, blocks), open(partial, "wb") as file:
        for block in blocks:
            audio, over = to_int16(block)
            digest.update(audio)
            file.write(audio)
            samples += len(audio)
            clipped += over
            peak = max(peak, -int(audio.min(initial=0)), int(audio.max(initial=0)))
    if not samples:
        raise SkippedFile("empty", "0 samples at 24 kHz")
    if peak < SILENCE_PEAK:
        raise SkippedFile("silent", f"peak {peak} of {FULL_SCALE} in {samples / SAMPLE_RATE:.1f} s")
    track = digest.hexdigest()
    os.replace(partial, audio_path(staging, track))
    return Outcome(track, samples, clipped, header.sample_rate, header.channels, header.format)
