"""Decoding to mono 24 kHz in blocks, against librosa.load of complete files (the peer).

python -m tests.benchmarks.prepare [FILE ...]    audio files, or else synthetic Vorbis
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import soundfile

from mert_jax.constants import SAMPLE_RATE
from tests.benchmarks import measure


# each side's process imports its own libraries only
def ours(files: Sequence[str]) -> Callable[[], None]:
    """Build a call that decodes all files, in blocks, to bytes of int16."""
    from mert_jax.data import decoding

    def run() -> None:
        for path in files:
            with decoding.decode(path) as (_, blocks):
                for block in blocks:
                    decoding.to_int16(block)[0].tobytes()

    return run


def peer(files: Sequence[str]) -> Callable[[], None]:
    """Build a call that decodes all files with librosa, each at once."""
    import librosa

    def run() -> None:
        for path in files:
            wave = librosa.load(path, sr=24_000, mono=True, res_type="soxr_hq")[0]
            np.clip(np.rint(wave * 32768), -32768, 32767).astype("<i2").tobytes()

    return run


def _write(path: str) -> None:
    from tests.benchmarks import stream

    rate = 2 * SAMPLE_RATE
    mono = stream.synthetic(1_200)  # played twice as fast: ten minutes at 48 kHz
    with soundfile.SoundFile(path, "w", rate, 2, "VORBIS") as file:
        for start in range(0, len(mono), rate):  # libsndfile crashes on long writes
            file.write(mono[start : start + rate, None].repeat(2, axis=1))


def _seconds(path: str) -> float:
    from mert_jax.data import decoding

    with decoding.decode(path) as (_, blocks):
        return sum(len(block) for block in blocks) / SAMPLE_RATE


def rows(files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The row `prepare`: CPU seconds of all threads for all files."""
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            files = [f"{folder}/music.ogg"]
            _write(files[0])
        hours = sum(_seconds(path) for path in files) / 3600
        files = [os.path.abspath(path) for path in files]
        times = measure.apart({"ours": (ours, files), "peer": (peer, files)}, clock="cpu")
    row = measure.row("prepare", "librosa.load", times["ours"], times["peer"])
    rates = [60 * hours / row[side] for side in ("ours_s", "peer_s")]
    return [row | {"note": "{:.1f} and {:.1f} hours of audio a minute and core".format(*rates)}]


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(row)
