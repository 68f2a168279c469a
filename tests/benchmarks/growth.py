"""Growth of a training step with batch size, clip length and model size, in one picture.

It shows the seconds of a step and the memory that the compiler plans.

The recipe is that of MERT v1 in float32 with stored codes, as in `step`. Each line fits a power of
the audio in a step; a slope of 1 means that twice the audio costs twice as much.

python -m tests.benchmarks.growth [--json=FILE] [--png=FILE]
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib import figure, ticker

from mert_jax import cli
from tests.benchmarks import step

# lines of (size, clips, seconds)
LINES = {
    "95M, 1 to 8 clips of 5 s": [("95m", clips, 5) for clips in (1, 2, 4, 8)],
    "95M, 1 clip of 5 to 60 s": [("95m", 1, seconds) for seconds in (5, 10, 20, 40, 60)],
    "330M, 1 to 4 clips of 5 s": [("330m", clips, 5) for clips in (1, 2, 4)],
}
REPEATS = 3

_JSON = flags.DEFINE_string("json", None, "File for the points.")
_PNG = flags.DEFINE_string("png", None, "File for the picture.")


def point(size: str, clips: int, seconds: int) -> dict[str, Any]:
    """Seconds of one step (the median), MiB of parameters and moments, and of temporaries."""
    config = step.config(f"{size}_stored", clips, "", half=False, dropout=True)
    config.data.num_samples = 24_000 * seconds
    run, compiled = step.Ours(config).compiled()
    run()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    memory = compiled.memory_analysis()
    return {
        "size": size,
        "clips": clips,
        "seconds": seconds,
        "step_s": float(np.median(times)),
        "state_mib": memory.argument_size_in_bytes / 2**20,
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
    }


def slope(points: Sequence[dict[str, Any]], key: str) -> float:
    """The power of the audio in a step that fits `key` best."""
    audio = [p["clips"] * p["seconds"] for p in points]
    return float(np.polyfit(np.log(audio), np.log([p[key] for p in points]), 1)[0])


def picture(lines: dict[str, Sequence[dict[str, Any]]]) -> figure.Figure:
    """Seconds and memory of a step against the seconds of audio in it."""
    panels = {"Step, s": ("step_s", 1), "Temporary memory, GiB": ("temporaries_mib", 2**-10)}
    drawn = figure.Figure((11, 4.2), layout="constrained")
    for axes, (title, (key, factor)) in zip(drawn.subplots(1, 2), panels.items(), strict=True):
        for name, points in lines.items():
            audio = [p["clips"] * p["seconds"] for p in points]
            label = f"{name}: slope {slope(points, key):.2f}"
            axes.plot(audio, [factor * p[key] for p in points], marker="o", label=label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="audio in a step, s", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_locator(ticker.NullLocator())
        axes.grid(color="#e8e8e8", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    return drawn


def main() -> None:
    """Measure all lines; write what the flags ask for."""
    lines, known = {}, {}
    for name, cases in LINES.items():
        lines[name] = []
        for case in cases:
            known[case] = known.get(case) or point(*case)
            jax.clear_caches()
            lines[name].append(known[case])
            print(name, known[case], flush=True)
    for name, points in lines.items():
        slopes = [slope(points, key) for key in ("step_s", "temporaries_mib")]
        print("{}: slopes {:.2f} of time, {:.2f} of memory".format(name, *slopes))
    if _JSON.value:
        with open(_JSON.value, "w") as f:
            json.dump(lines, f, indent=1)
    if _PNG.value:
        picture(lines).savefig(_PNG.value, format="png", dpi=130)


if __name__ == "__main__":
    cli.run(main)
