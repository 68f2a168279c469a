"""Decodes audio files of any length to mono blocks of any rate, in constant memory.

libsndfile reads them, or ffmpeg if it is installed. Shapes: n samples in a block, C channels.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from mert_jax.constants import FULL_SCALE, SAMPLE_RATE

FFMPEG_SUFFIXES = tuple(".m4a .m4b .aac .ac3 .ape .wma .wv .mp2 .mka .tta .tak .dsf".split())
SUFFIXES = FFMPEG_SUFFIXES + tuple(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64".split()
)
# a file shorter than its header says by more than this is truncated; some encoders round the header
MISSING_TOLERANCE = 0.01
Blocks = Iterator[np.ndarray]
_BLOCK_SAMPLES = 1 << 19  # over all channels: 2 MiB of float32, whatever the channel count


class SkippedFile(Exception):
    """A file cannot be used, for one of the `reason`s that a report counts, with a `detail`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Header(NamedTuple):
    """Content of a file's header; `frames` is None if it does not tell."""

    sample_rate: int
    channels: int
    format: str
    frames: int | None


def is_audio_name(name: str) -> bool:
    """Return whether a file name has the suffix of an audio format."""
    return name.lower().endswith(SUFFIXES)


def to_int16(wave: np.ndarray) -> tuple[np.ndarray, int]:
    """Round f32 [n] in [-1, 1) to little-endian int16 [n], and count the clipped samples."""
    scaled = np.rint(wave * np.float32(FULL_SCALE))
    clipped = np.count_nonzero((scaled > FULL_SCALE - 1) | (scaled < -FULL_SCALE))
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype("<i2"), int(clipped)


@contextlib.contextmanager
def decode(path: str, sample_rate: int = SAMPLE_RATE) -> Iterator[tuple[Header, Blocks]]:
    """Open an audio file and yield its header and mono blocks f32 [n] at `sample_rate`.

    Raises SkippedFile here or while iterating: a truncated file shows at its end only.
    """
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise SkippedFile("empty", "the file has 0 bytes")
    except OSError as e:
        raise SkippedFile("unreadable", e.strerror or str(e)) from e
    try:
        # as bytes: soundfile cannot encode a name that is not UTF-8
        file = soundfile.SoundFile(os.fsencode(path))
    except soundfile.LibsndfileError as e:
        if shutil.which("ffmpeg"):
            opened = _open_ffmpeg(path)
        elif path.lower().endswith(FFMPEG_SUFFIXES):
            detail = "libsndfile does not read this format; install ffmpeg"
            raise SkippedFile("needs ffmpeg", detail) from e
        else:
            # without the path, which the message begins with
            raise SkippedFile("not audio", str(e).rpartition("': ")[2] or str(e)) from e
    else:
        opened = _open_sndfile(file, path)
    with opened as (header, blocks):
        yield header, _resample(_mono(blocks, header), header.sample_rate, sample_rate)


def _resample(blocks: Blocks, sample_rate: int, to: int) -> Blocks:
    if sample_rate == to:
        yield from blocks
        return
    stream = soxr.ResampleStream(sample_rate, to, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _mono(blocks: Iterable[np.ndarray], header: Header) -> Blocks:
    """Average f32 [n, C] over channels, and check values and length."""
    frames = seconds = 0
    for block in blocks:
        frames += len(block)
        seconds = frames / header.sample_rate
        wave = block[:, 0].copy()
        for channel in range(1, header.channels):  # several times faster than mean(axis=1)
            wave += block[:, channel]
        wave /= header.channels
        if not np.isfinite(wave).all():  # one NaN or Inf in a channel spoils the sum
            raise SkippedFile("NaN or Inf", f"before {seconds:.1f} s")
        yield wave
    if not frames:
        raise SkippedFile("empty", "0 samples")
    if header.frames and frames < header.frames * (1 - MISSING_TOLERANCE):
        announced = header.frames / header.sample_rate
        detail = f"{seconds:.1f} s decoded of {announced:.1f} s in the header"
        raise SkippedFile("truncated", detail)


@contextlib.contextmanager
def _open_sndfile(file: soundfile.SoundFile, path: str) -> Iterator[tuple[Header, Blocks]]:
    with file:
        # libsndfile silently shortens wav, aiff and ogg files that end early
        frames = _announced_frames(file.extra_info, file.frames)
        if file.format == "OGG" and _ends_inside_a_page(path):
            raise SkippedFile("truncated", "the last Ogg page is cut off")
        header = Header(file.samplerate, file.channels, f"{file.format}/{file.subtype}", frames)
        yield header, _sndfile_blocks(file)


def _sndfile_blocks(file: soundfile.SoundFile) -> Blocks:
    frames, done = max(1, _BLOCK_SAMPLES // file.channels), 0
    try:
        while len(block := file.read(frames, "float32", always_2d=True)):
            done += len(block)
            yield block
    except soundfile.LibsndfileError as e:
        detail = f"decoder error past {done / file.samplerate:.1f} s: {e}"
        raise SkippedFile("truncated", detail) from e


def _announced_frames(log: str, frames: int) -> int:
    """Return the frames of the header, from a log line `data : 1764000 (should be 1058382)`."""
    match = re.search(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", log, re.MULTILINE)
    announced, present = map(int, match.groups()) if match else (0, 0)
    # sizes near the 32-bit limit mean nothing: encoders that write to a pipe put them there
    known = present > 0 and announced < 0x7FFF_0000
    return round(frames * announced / present) if known else frames


def _ends_inside_a_page(path: str) -> bool:
    """Return whether an Ogg file stops before the end of its last page (RFC 3533, section 6)."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 2 * 65_307))  # a page is at most 65,307 bytes
        _, start, rest = file.read().rpartition(b"OggS\0")
    page = start + rest if start else b""
    segments = page[26] if len(page) > 26 else 255
    return len(page) < 27 + segments + sum(page[27 : 27 + segments])


@contextlib.contextmanager
def _open_ffmpeg(path: str) -> Iterator[tuple[Header, Blocks]]:
    # libsndfile reads the au format from a pipe
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-i", "file:" + path]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )

        def skipped(reason: str) -> SkippedFile:
            log.seek(0)
            lines = map(str.strip, log.read().decode(errors="replace").split("\n"))
            return SkippedFile(reason, f"ffmpeg: {next(filter(None, lines), 'no message')}")

        def blocks() -> Blocks:
            yield from _sndfile_blocks(file)
            if process.wait():
                raise skipped("truncated")

        try:
            with soundfile.SoundFile(process.stdout.fileno(), closefd=False) as file:
                yield Header(file.samplerate, file.channels, "ffmpeg", None), blocks()
        except soundfile.LibsndfileError as e:
            process.wait()
            raise skipped("not audio") from e
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
