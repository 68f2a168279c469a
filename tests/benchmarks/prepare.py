"""Decoding to mono 24 kHz: ours, in blocks, against librosa.load of whole files (the peer).

python -m tests.benchmarks.prepare [FILE ...]    audio files, or else synthetic Vorbis
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import soundfile

from mert_jax import decode
from tests.benchmarks import measure
from tests.benchmarks.stream import synthetic

_MEASURE = """
import re, sys, time
{setup}
run(sys.argv[1])
best = float("inf")
for _ in range(3):
    begin = time.process_time()
    for path in sys.argv[1:]:
        run(path)
    best = min(best, time.process_time() - begin)
# not ru_maxrss: that starts at what the parent used
print(best, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""
_OURS = """
from mert_jax.decode import decode, to_int16
def run(path):
    with decode(path) as (header, blocks):
        for block in blocks:
            to_int16(block)[0].tobytes()
"""
_PEER = """
import librosa, numpy as np
def run(path):
    wave = librosa.load(path, sr=24_000, mono=True, res_type="soxr_hq")[0]
    np.clip(np.rint(wave * 32768), -32768, 32767).astype("<i2").tobytes()
"""


def _measure(setup: str, files: Sequence[str]) -> tuple[float, float]:
    command = [sys.executable, "-c", _MEASURE.format(setup=setup), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, mib = map(float, done.stdout.split())
    return seconds, mib


def _seconds(path: str) -> float:
    with decode.decode(path) as (_, blocks):
        return sum(len(block) for block in blocks) / decode.SAMPLE_RATE


def rows(files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The row `prepare`: CPU seconds of one core for all files, peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            files = [f"{folder}/music.ogg"]
            rate = 2 * decode.SAMPLE_RATE
            mono = synthetic(1_200)  # played twice as fast: ten minutes at 48 kHz
            with soundfile.SoundFile(files[0], "w", rate, 2, "VORBIS") as file:
                for start in range(0, len(mono), rate):  # libsndfile crashes on minutes at once
                    file.write(mono[start : start + rate, None].repeat(2, axis=1))
        hours = sum(_seconds(path) for path in files) / 3600
        (ours, ours_mib), (peer, peer_mib) = _measure(_OURS, files), _measure(_PEER, files)
    row = measure.row("prepare", "librosa.load", [ours], [peer], (ours_mib, peer_mib))
    rates = [60 * hours / seconds for seconds in (ours, peer)]
    return [row | {"note": "{:.1f} and {:.1f} hours of audio a minute and core".format(*rates)}]


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(row)
