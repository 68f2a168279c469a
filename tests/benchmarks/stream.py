"""Reading crops: records of raw int16 (ours) against records of FLAC (the peer).

python -m tests.benchmarks.stream [FILE ...]    audio files, or else synthetic music
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from array_record.python.array_record_data_source import ArrayRecordDataSource

from mert_jax import decode, records

CHUNK, CROP, CLIPS, ROUNDS = 720_000, 122_880, 300, 3


def synthetic(seconds: int) -> np.ndarray:
    """Chords with a little noise, int16 [n]: FLAC makes about half of it, as of music."""
    rng = np.random.default_rng(0)
    t = np.arange(seconds * decode.SAMPLE_RATE) / decode.SAMPLE_RATE
    pitches = 110 * 2 ** (rng.integers(0, 36, 6) / 12)
    wave = sum(np.sin(2 * np.pi * f * t) for f in pitches) * 0.05 + rng.normal(0, 0.003, len(t))
    return decode.to_int16(wave.astype(np.float32))[0]


def _read(path: str) -> np.ndarray:
    with decode.decode(path) as (_, blocks):
        return np.concatenate([decode.to_int16(block)[0] for block in blocks])


def _flac(audio: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, decode.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _raw_crop(record: bytes, start: int) -> np.ndarray:
    return np.frombuffer(record, "<i2")[start : start + CROP]


def _flac_crop(record: bytes, start: int) -> np.ndarray:
    with soundfile.SoundFile(io.BytesIO(record)) as file:
        file.seek(start)
        return file.read(CROP, dtype="int16")


def _seconds_a_clip(path: str, crop: Callable[[bytes, int], np.ndarray]) -> float:
    """CPU seconds to read one random crop as f32, the best of a few rounds."""
    source = ArrayRecordDataSource([path])
    best = float("inf")
    for _ in range(ROUNDS):
        rng = np.random.default_rng(0)
        begin = time.process_time()
        for _ in range(CLIPS):
            start = int(rng.integers((CHUNK - CROP) // records.HOP_LENGTH)) * records.HOP_LENGTH
            crop(source[int(rng.integers(len(source)))], start).astype(np.float32)
        best = min(best, (time.process_time() - begin) / CLIPS)
    return best


def rows(files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The row `stream`: CPU seconds for a clip of 5 s, MiB on disk of the same chunks."""
    waves = [_read(path) for path in files] or [synthetic(600)]
    chunks = [w[a:b] for w in waves for a, b in records.chunk_spans(len(w), CHUNK, CROP)]
    chunks = [chunk[:CHUNK] for chunk in chunks if len(chunk) >= CHUNK]
    with tempfile.TemporaryDirectory() as folder:
        raw, flac = Path(folder) / "raw", Path(folder) / "flac"
        records.write_shard(str(raw), (chunk.tobytes() for chunk in chunks))
        records.write_shard(str(flac), (_flac(chunk) for chunk in chunks))
        ours, peer = _seconds_a_clip(str(raw), _raw_crop), _seconds_a_clip(str(flac), _flac_crop)
        sizes = [path.stat().st_size / 2**20 for path in (raw, flac)]
    return [
        {
            "name": "stream",
            "peer": "FLAC records",
            "ours_s": ours,
            "peer_s": peer,
            "ratio": peer / ours,
            "ours_mib": sizes[0],
            "peer_mib": sizes[1],
        }
    ]


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(row, f"{1 / row['ours_s']:.0f} against {1 / row['peer_s']:.0f} clips a second a core")
