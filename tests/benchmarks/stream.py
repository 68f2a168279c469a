"""The input stream: batches of random crops of a prepared dataset.

The peer reads the same records in FLAC instead of raw int16, decoded from the start of the crop.

python -m tests.benchmarks.stream [FILE ...]    audio files, or else synthetic music
"""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from array_record.python.array_record_data_source import ArrayRecordDataSource

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import decoding, pipeline, records
from tests.benchmarks import measure

SAMPLES, BATCH, BATCHES = 120_000, 50, 10


def synthetic(seconds: int) -> np.ndarray:
    """Return chords with noise, int16 [n]; FLAC halves their size, as it does with music."""
    rng = np.random.default_rng(0)
    t = np.arange(seconds * SAMPLE_RATE) / SAMPLE_RATE
    pitches = 110 * 2 ** (rng.integers(0, 36, 6) / 12)
    wave = sum(np.sin(2 * np.pi * f * t) for f in pitches) * 0.05 + rng.normal(0, 0.003, len(t))
    return decoding.to_int16(wave.astype(np.float32))[0]


class _Flac:
    """A record's audio as `pipeline.RandomClip` slices it, read from FLAC."""

    def __init__(self, record: bytes):
        self._file = soundfile.SoundFile(io.BytesIO(record))

    def __len__(self) -> int:
        return self._file.frames

    def __getitem__(self, span: slice) -> np.ndarray:
        self._file.seek(span.start)
        return self._file.read(span.stop - span.start, dtype="int16")


class _FlacSource:
    def __init__(self, path: str):
        self._records = ArrayRecordDataSource([path])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"audio": _Flac(self._records[index]), "codes": {}}


def _write(folder: str, files: Sequence[str]) -> list[float]:
    """The dataset as `prepare` writes it, and its records in FLAC; MiB of both on disk."""
    music, raw, flac = (os.path.join(folder, name) for name in ("music", "raw", "flac"))
    os.mkdir(music)
    for i, path in enumerate(files):
        os.symlink(os.path.abspath(path), os.path.join(music, f"{i}_{os.path.basename(path)}"))
    if not files:
        soundfile.write(os.path.join(music, "a.wav"), synthetic(600), SAMPLE_RATE)
    flags = f"--input={music}", f"--output={raw}", "--validation_fraction=0"
    command = [sys.executable, "-m", "mert_jax.prepare", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records.write_shard(flac, map(_encoded, records.open_source(raw, "train")))
    sizes = [sum(x.stat().st_size for x in Path(raw).rglob("*.array_record*"))]
    return [size / 2**20 for size in (*sizes, os.path.getsize(flac))]


def _encoded(record: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    options = dict(format="FLAC", subtype="PCM_16")
    soundfile.write(buffer, record["audio"], SAMPLE_RATE, **options)
    return buffer.getvalue()


def ours(folder: str) -> Callable[[], Any]:
    """Build a call that reads `BATCHES` batches of the training stream."""
    return _read(records.open_source(os.path.join(folder, "raw"), "train"))


def peer(folder: str) -> Callable[[], Any]:
    """Build a call that reads the same stream from FLAC."""
    return _read(_FlacSource(os.path.join(folder, "flac")))


def _read(source: Any) -> Callable[[], Any]:
    sizes = dict(num_samples=SAMPLES, batch_size=BATCH)
    stream = pipeline.train_stream([source], seed=0, **sizes)
    return lambda: [next(stream) for _ in range(BATCHES)]


def rows(files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The row `stream`: CPU seconds of all threads for a clip of 5 s; memory after 12,500 clips."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = _write(folder, files)
        sides = {"ours": (ours, folder), "peer": (peer, folder)}
        times = measure.apart(sides, rounds=5, calls=4, clock="cpu")
    for timing in times.values():
        timing.seconds = [seconds / (BATCHES * BATCH) for seconds in timing.seconds]
    row = measure.row("stream", "FLAC records", times["ours"], times["peer"])
    rates = [1 / row[side] for side in ("ours_s", "peer_s")]
    note = "{:.0f} and {:.0f} clips a second and core, {:.0f} and {:.0f} MiB on disk"
    return [row | {"note": note.format(*rates, *sizes), "clips_per_s": rates[0]}]


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(row)
