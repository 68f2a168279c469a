"""Timing of two sides in separate processes, and the row of a benchmark that compares them.

A side is a top-level function of a module and its arguments; it builds the call that is timed. Its
process loads the libraries that it needs only, so that compilation and memory are its own.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

THREADS = len(os.sched_getaffinity(0))  # for each side
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: of all threads


@dataclasses.dataclass
class Timing:
    """Seconds of a side's calls, and the peak memory of its process, or of its GPU."""

    seconds: list[float]
    mib: float = 0.0


def apart(
    sides: dict[str, tuple[Any, ...]],
    rounds: int = 3,
    calls: int = 3,
    clock: str = "wall",
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time sides (function, *arguments), each in its own process.

    The processes take turns, so that other load affects all sides alike. A turn is `calls` calls in
    a row, or one second of them, after a call that is not timed. The memory is that of `device`,
    `cpu` or `cuda`.
    """
    processes = {name: _start(clock, device, *side) for name, side in sides.items()}
    timings = {name: Timing([]) for name in sides}
    try:
        for name in [*sides] * rounds:
            seconds, timings[name].mib = _turn(processes[name], calls)
            timings[name].seconds += seconds
    finally:
        for process in processes.values():
            process.communicate()  # closing its input ends the process
    return timings


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, list[float]]:
    """Time functions in this process, in turns, after one warm-up call each."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(_time(function, time.perf_counter))
    return seconds


def relative_l2(a: np.ndarray, exact: np.ndarray) -> float:
    """|a - exact| / |exact|."""
    return float(np.linalg.norm(a - exact) / np.linalg.norm(exact))


def row(name: str, peer: str, ours: Timing, theirs: Timing) -> dict[str, Any]:
    """Return a row with medians and ranges of the times."""
    ours_s, peer_s = np.median(ours.seconds), np.median(theirs.seconds)
    return {
        "name": name,
        "peer": peer,
        "ours_s": float(ours_s),
        "peer_s": float(peer_s),
        "ratio": float(peer_s / ours_s),
        "ours_mib": ours.mib,
        "peer_mib": theirs.mib,
        "ours_range_s": [min(ours.seconds), max(ours.seconds)],
        "peer_range_s": [min(theirs.seconds), max(theirs.seconds)],
    }


def with_flops(row: dict[str, Any], flops: float) -> dict[str, Any]:
    """Return the row of a call of `flops` FLOPs, with the FLOPs per second of both sides."""
    return row | {"flops_per_s": [flops / row[side] for side in ("ours_s", "peer_s")]}


def faster(timings: dict[str, Timing], names: Sequence[str]) -> str:
    """Return the one of `names` with the lowest median."""
    return min(names, key=lambda name: np.median(timings[name].seconds))


def _start(
    clock: str, device: str, function: Callable[..., Any], *arguments: Any
) -> subprocess.Popen:
    module = function.__module__
    if module == "__main__":
        module = sys.modules[module].__spec__.name
    what = json.dumps([clock, device, module, function.__name__, *arguments])
    command = [sys.executable, "-m", "tests.benchmarks.measure", what]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], **pipes)


def _turn(process: subprocess.Popen, calls: int) -> tuple[list[float], float]:
    """Have a process make at least `calls` calls; return their seconds and its peak memory, MiB."""
    try:
        print(calls, file=process.stdin, flush=True)
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RuntimeError(f"a benchmark's process ended with code {process.wait()}, see above")
    return json.loads(answer)


def _time(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    begin = clock()
    function()
    return clock() - begin


def _serve(clock: str, device: str, module: str, name: str, *arguments: Any) -> None:
    """The other end of `_turn`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries must not print into the answers
    run = getattr(importlib.import_module(module), name)(*arguments)
    for line in sys.stdin:
        run()
        seconds, end = [], time.perf_counter() + 1
        while len(seconds) < int(line) or time.perf_counter() < end:
            seconds.append(_time(run, CLOCKS[clock]))
        print(json.dumps([seconds, _peak_mib(device)]), file=answers, flush=True)


def _peak_mib(device: str) -> float:
    if device == "cpu":
        # ru_maxrss would start at the memory of the parent
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    if torch := sys.modules.get("torch"):  # the side of mert_jax does not import torch
        return torch.cuda.max_memory_allocated() / 2**20
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
