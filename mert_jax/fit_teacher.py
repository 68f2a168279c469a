"""Fit a teacher to a prepared dataset: frames of music -> one file that `teachers.make` reads.

    python -m mert_jax.fit_teacher --teacher=kmeans --data=DATA --output=DIR

DATA is what `mert_jax.prepare` wrote. DIR gets teacher.safetensors (for
`teachers.make("kmeans", checkpoint=DIR)` and `--config.teacher.kmeans.checkpoint=DIR`), report.json
and report.png: how many codes are in use, and how much of the frames' variance the codebooks leave,
on the train split and on the tracks held out. The same seed, data and sizes give the same bytes.
"""

import json
import os
import time
from typing import Any

from absl import flags

from mert_jax import cli
from mert_jax.cli import UserError
from mert_jax.fitting import Fitted, Task, figures, progress, table
from mert_jax.fitting.sampling import Sampler
from mert_jax.teachers import fitted

_TEACHER = flags.DEFINE_string("teacher", None, "Which teacher: kmeans, mel_rvq, ...")
_DATA = flags.DEFINE_string("data", None, "Directory of a prepared dataset.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the fitted teacher.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the frames drawn and of the first centres.", 0)
_FRAMES = flags.DEFINE_integer(
    "frames", 100_000, "Frames drawn at most (75 a second); more take more memory and time.", 1
)
_ITERATIONS = flags.DEFINE_integer("iterations", 50, "Steps of k-means a codebook at most.", 1)


def fit(teacher: str, sampler: Sampler, output: str, seed: int, iterations: int) -> dict[str, Any]:
    """Fit `teacher`, write it and its report into `output`, and return the report.

    Raises UserError for an output that holds something else or cannot be written, and for too
    little music.
    """
    _check_writable(output)
    file = os.path.join(output, fitted.FILE)
    if os.path.exists(file) and (held := fitted.describe(file)["teacher"]) != teacher:
        raise UserError(
            f"{file} holds teacher {held!r}; give another --output for {teacher!r}, or remove it"
        )
    started = time.monotonic()
    found = table()[teacher](Task(sampler, seed, iterations))
    fingerprint = sampler.metadata["fingerprint"]
    settings = dict(found.settings) | {"seed": seed, "fingerprint": fingerprint}
    report = {
        "teacher": teacher,
        "settings": settings,
        "frames": {split: sampler.available(split) for split in found.figures},
        "iterations": iterations,
        "seconds": round(time.monotonic() - started, 1),
        "figures": {s: [b._asdict() for b in books] for s, books in found.figures.items()},
    }
    try:
        _write(output, found, teacher, settings, report)
    except OSError as e:
        raise UserError(
            f"cannot write {output}: {e.strerror or e}; free it or give another --output"
        ) from e
    print(figures.text(found.figures))
    return report


def _check_writable(output: str) -> None:
    """Raise UserError now for what would fail after minutes of fitting."""
    if "://" in output:
        raise UserError(f"--output={output}: written to a local disk only; fit there and copy it")
    existing = os.path.abspath(output)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write {output}: {existing} is no directory that can be written")


def _write(
    output: str, found: Fitted, teacher: str, settings: dict[str, Any], report: dict[str, Any]
) -> None:
    fitted.save(output, teacher, found.tensors, settings)
    text = json.dumps(report, indent=1) + "\n"
    fitted.write(os.path.join(output, "report.json"), text.encode())
    picture = figures.png(found.figures, f"{teacher}, {report['frames']['train']} frames")
    fitted.write(os.path.join(output, "report.png"), picture)


def main() -> int:
    """Run the command and return its exit code."""
    known = ", ".join(table())
    if not (_TEACHER.value and _DATA.value and _OUTPUT.value):
        raise UserError(
            f"--teacher, --data and --output are needed: --teacher=NAME (one of {known}) "
            "--data=PREPARED_DIR --output=DIR"
        )
    if _TEACHER.value not in table():
        raise UserError(f"--teacher={_TEACHER.value} cannot be fitted; it is one of {known}")
    try:
        sampler = Sampler(_DATA.value, _SEED.value, _FRAMES.value)
        report = fit(_TEACHER.value, sampler, _OUTPUT.value, _SEED.value, _ITERATIONS.value)
    except KeyboardInterrupt:
        progress.note(f"stopped; nothing was written to {_OUTPUT.value}")
        return 130
    progress.note(f"{os.path.join(_OUTPUT.value, fitted.FILE)} in {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main)
