"""Decodes audio files of any length to mono blocks of any rate, in constant memory.

libsndfile (through soundfile) reads wav, flac, ogg, opus and mp3, and ffmpeg, if it is installed,
the rest. Shapes: n samples in a block, C channels.
"""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from mert_jax.constants import FULL_SCALE, SAMPLE_RATE

SNDFILE_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64".split()
)
FFMPEG_SUFFIXES = frozenset(".m4a .m4b .aac .ac3 .ape .wma .wv .mp2 .mka .tta .tak .dsf".split())
# a file shorter than its header says by more than this is truncated; some encoders round the header
MISSING_TOLERANCE = 0.01
_BLOCK_SAMPLES = 1 << 19  # over all channels: 2 MiB of float32, whatever the channel count


class SkippedFile(Exception):
    """A file cannot be used, for one of the `reason`s that a report counts, with a `detail`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Header(NamedTuple):
    """Content of a file's header; `frames` is None if it does not tell."""

    sample_rate: int
    channels: int
    format: str
    frames: int | None


def is_audio_name(name: str) -> bool:
    """Return whether a file name has the suffix of an audio format."""
    return os.path.splitext(name)[1].lower() in SNDFILE_SUFFIXES | FFMPEG_SUFFIXES


def to_int16(wave: np.ndarray) -> tuple[np.ndarray, int]:
    """Round f32 [n] in [-1, 1) to little-endian int16 [n], and count the clipped samples."""
    scaled = np.rint(wave * np.float32(FULL_SCALE))
    clipped = np.count_nonzero((scaled > FULL_SCALE - 1) | (scaled < -FULL_SCALE))
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype("<i2"), int(clipped)


def resample(
    blocks: Iterable[np.ndarray], sample_rate: int, to: int = SAMPLE_RATE
) -> Iterator[np.ndarray]:
    """Resample mono blocks f32 [n] at `sample_rate` to rate `to`, as one continuous signal."""
    if sample_rate == to:
        yield from blocks
        return
    stream = soxr.ResampleStream(sample_rate, to, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


@contextlib.contextmanager
def decode(
    path: str, sample_rate: int = SAMPLE_RATE
) -> Iterator[tuple[Header, Iterator[np.ndarray]]]:
    """Open an audio file and yield its header and mono blocks f32 [n] at `sample_rate`.

    Raises SkippedFile here or while iterating: a truncated file shows at its end only.
    """
    _check_readable(path)
    with _open(path) as (header, blocks):
        yield header, resample(_mono(blocks, header), header.sample_rate, sample_rate)


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as e:
        raise SkippedFile("unreadable", e.strerror or str(e)) from e
    if empty:
        raise SkippedFile("empty", "the file has 0 bytes")


def _mono(blocks: Iterable[np.ndarray], header: Header) -> Iterator[np.ndarray]:
    """Average f32 [n, C] over channels, and check values and length."""
    frames = 0
    for block in blocks:
        frames += len(block)
        wave = block[:, 0].copy()
        for channel in range(1, header.channels):  # several times faster than mean(axis=1)
            wave += block[:, channel]
        wave /= header.channels
        if not np.isfinite(wave).all():  # one NaN or Inf in a channel spoils the sum
            raise SkippedFile("NaN or Inf", f"before {frames / header.sample_rate:.1f} s")
        yield wave
    if not frames:
        raise SkippedFile("empty", "0 samples")
    if header.frames and frames < header.frames * (1 - MISSING_TOLERANCE):
        seconds, announced = frames / header.sample_rate, header.frames / header.sample_rate
        raise SkippedFile(
            "truncated", f"{seconds:.1f} s decoded of {announced:.1f} s in the header"
        )


def _open(path: str) -> contextlib.AbstractContextManager[tuple[Header, Iterator[np.ndarray]]]:
    try:
        # as bytes: soundfile cannot encode a name that is not UTF-8
        file = soundfile.SoundFile(os.fsencode(path))
    except soundfile.LibsndfileError as e:
        if shutil.which("ffmpeg"):
            return _open_ffmpeg(path)
        if os.path.splitext(path)[1].lower() in FFMPEG_SUFFIXES:
            detail = "libsndfile does not read this format; install ffmpeg"
            raise SkippedFile("needs ffmpeg", detail) from e
        # without the path, which the message begins with
        raise SkippedFile("not audio", str(e).rpartition("': ")[2] or str(e)) from e
    return _open_sndfile(file, path)


@contextlib.contextmanager
def _open_sndfile(
    file: soundfile.SoundFile, path: str
) -> Iterator[tuple[Header, Iterator[np.ndarray]]]:
    with file:
        # libsndfile silently shortens wav, aiff and ogg files that end early
        frames = _announced_frames(file.extra_info, file.frames)
        if file.format == "OGG" and _ends_inside_a_page(path):
            raise SkippedFile("truncated", "the last Ogg page is cut off")
        header = Header(file.samplerate, file.channels, f"{file.format}/{file.subtype}", frames)
        yield header, _sndfile_blocks(file)


def _sndfile_blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    frames = max(1, _BLOCK_SAMPLES // file.channels)
    done = 0
    while True:
        try:
            block = file.read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as e:
            seconds = done / file.samplerate
            raise SkippedFile("truncated", f"decoder error past {seconds:.1f} s: {e}") from e
        if not len(block):
            return
        done += len(block)
        yield block


def _announced_frames(log: str, frames: int) -> int:
    """Return the frames of the header, from a log line `data : 1764000 (should be 1058382)`.

    Sizes near the 32-bit limit mean nothing: encoders that write to a pipe put them there.
    """
    match = re.search(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if not match:
        return frames
    announced, present = map(int, match.groups())
    if announced >= 0x7FFF_0000 or present <= 0:
        return frames
    return round(frames * announced / present)


def _ends_inside_a_page(path: str) -> bool:
    """Return whether an Ogg file stops before the end of its last page (RFC 3533, section 6)."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2 * 65_307))  # a page is at most 65,307 bytes
        tail = file.read()
    start = tail.rfind(b"OggS\0")
    if start < 0:
        return True
    page = tail[start:]
    segments = page[26] if len(page) > 26 else 255
    return len(page) < 27 + segments + sum(page[27 : 27 + segments])


@contextlib.contextmanager
def _open_ffmpeg(path: str) -> Iterator[tuple[Header, Iterator[np.ndarray]]]:
    # the header of the au format gives the rate and channels of a stream
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-i", "file:" + path]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
        try:
            start = process.stdout.read(24)
            if len(start) < 24 or start[:4] != b".snd":
                process.wait()
                raise SkippedFile("not audio", f"ffmpeg: {_first_line(log)}")
            _, offset, _, _, sample_rate, channels = struct.unpack(">4s5I", start)
            process.stdout.read(offset - 24)
            header = Header(sample_rate, channels, "ffmpeg", None)
            yield header, _ffmpeg_blocks(process, channels, log)
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def _ffmpeg_blocks(process: subprocess.Popen, channels: int, log) -> Iterator[np.ndarray]:
    frame_bytes = 4 * channels
    frames = max(1, _BLOCK_SAMPLES // channels)
    while data := process.stdout.read(frames * frame_bytes):
        data = data[: len(data) - len(data) % frame_bytes]
        yield np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, channels)
    if process.wait():
        raise SkippedFile("truncated", f"ffmpeg: {_first_line(log)}")


def _first_line(log) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in lines if line.strip()), "no message")
