"""The rows of the benchmarks as a Markdown table, each with its bar."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# The ratios (peer time over ours) to reach on a CPU with two cores. docs/benchmarks.md explains why
# the original targets for the student and the step are out of reach.
BARS = {
    "cqt_nnaudio": 60.0,
    "rvq_vae": 2.0,
    "student_95m_forward_b4": 1.0,
    "student_95m_backward_b4": 1.0,
    "step_95m": 1.0,
}
CLIPS_PER_SECOND = 100.0  # to reach on one core
HEADER = ("row", "against", "ours", "the peer's", "ratio", "bar", "memory, MiB")


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """A table of medians, ranges, ratios and memory."""
    lines = [HEADER, ("---",) * len(HEADER), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def missed(row: dict[str, Any], share: float) -> bool:
    """Return whether a row is below a share of its bar."""
    low = row["ratio"] < share * BARS.get(row["name"], 0)
    return low or row.get("clips_per_s", np.inf) < share * CLIPS_PER_SECOND


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bar = f"{BARS[row['name']]:g}x" if row["name"] in BARS else ""
    bar = f"{CLIPS_PER_SECOND:g} clips/s" if "clips_per_s" in row else bar
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] < 10 else f"{row['ratio']:.0f}x"
    times = [_time(row[f"{side}_s"], row.get(f"{side}_range_s")) for side in ("ours", "peer")]
    notes = [row["note"]] if row.get("note") else []
    if "flops_per_s" in row:
        notes.append("{:.0f} and {:.0f} GFLOP/s".format(*(1e-9 * x for x in row["flops_per_s"])))
    if "mfu" in row:
        notes.append("MFU {:.3f} and {:.3f}".format(*row["mfu"]))
    memory = f"{row['ours_mib']:.0f}, {row['peer_mib']:.0f}"
    name = row["name"] + "".join(f", {note}" for note in notes)
    return (name, row["peer"], *times, ratio, bar, memory)


def _time(median: float, between: Sequence[float] | None) -> str:
    """Seconds or milliseconds, with the range."""
    unit, factor = ("s", 1) if median >= 0.1 else ("ms", 1e3)
    text = f"{factor * median:.3g} {unit}"
    if between and between[0] < between[1]:
        low, high = (f"{factor * x:.3g}" for x in between)
        text += f" ({low} to {high})"
    return text
