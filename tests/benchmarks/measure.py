"""What benchmarks share: fair timing of two sides, the memory of a process, a row."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

THREADS = len(os.sched_getaffinity(0))  # for each side
_PEAK = """
import re
from {module} import {name}
found = {name}()
# not ru_maxrss: that starts at what the parent used
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(int(peak[1]) / 1024 if found is None else found)
"""


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, list[float]]:
    """Seconds of each function's calls, in turns so that all meet the same load, after one warm
    call each; a function returns when its result is there."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak_mib(function: Callable[[], Any]) -> float:
    """Peak memory of a fresh process that imports `function`, of a module's top level, and calls
    it: with the libraries and compilation it needs. Or what `function` returns, of a GPU's."""
    module = function.__module__
    if module == "__main__":
        module = sys.modules[module].__spec__.name
    code = _PEAK.format(module=module, name=function.__name__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def relative_l2(a: np.ndarray, exact: np.ndarray) -> float:
    """|a - exact| / |exact|."""
    return float(np.linalg.norm(a - exact) / np.linalg.norm(exact))


def row(
    name: str, peer: str, ours_s: Sequence[float], peer_s: Sequence[float], mib: tuple[float, float]
) -> dict[str, Any]:
    """One row of medians, with the range of the times beside them; mib: ours, the peer's."""
    return {
        "name": name,
        "peer": peer,
        "ours_s": float(np.median(ours_s)),
        "peer_s": float(np.median(peer_s)),
        "ratio": float(np.median(peer_s) / np.median(ours_s)),
        "ours_mib": mib[0],
        "peer_mib": mib[1],
        "ours_range_s": [min(ours_s), max(ours_s)],
        "peer_range_s": [min(peer_s), max(peer_s)],
    }
