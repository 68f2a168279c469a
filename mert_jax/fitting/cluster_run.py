"""Fitting clusters or statistics: one teacher's file, and the report beside it."""

import json
import os
import time
from typing import Any

from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.fitting import figures
from mert_jax.fitting.fitted import Fitted, Task
from mert_jax.fitting.registry import fitters
from mert_jax.fitting.sampling import Sampler
from mert_jax.teachers import fitted_file


def fit(teacher: str, sampler: Sampler, output: str, seed: int, iterations: int) -> dict[str, Any]:
    """Fit `teacher`, write it and its report into `output`, and return the report.

    Raises UserError for an output that holds something else or cannot be written, and for too
    little music.
    """
    check_writable(output)
    file = os.path.join(output, fitted_file.FILE)
    if os.path.exists(file) and (held := fitted_file.read_header(file)["teacher"]) != teacher:
        raise UserError(
            f"{file} holds teacher {held!r}; give another --output for {teacher!r}, or remove it"
        )
    started = time.monotonic()
    found = fitters()[teacher](Task(sampler, seed, iterations))
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


def check_writable(output: str) -> None:
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
    fitted_file.write_fitted(output, teacher, found.tensors, settings)
    text = json.dumps(report, indent=1) + "\n"
    _write_bytes(os.path.join(output, "report.json"), text.encode())
    picture = figures.png(found.figures, f"{teacher}, {report['frames']['train']} frames")
    _write_bytes(os.path.join(output, "report.png"), picture)


def _write_bytes(path: str, content: bytes) -> None:
    with atomic_write(path, replace=True) as temporary, open(temporary, "wb") as file:
        file.write(content)
