"""Fitting a teacher of clusters or statistics: its file, and a report beside it."""

import json
import os
import time
from typing import Any

from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.fitting import figures
from mert_jax.fitting.fitters import FITTERS
from mert_jax.fitting.sampling import Sampler
from mert_jax.teachers import fitted_file


def fit(teacher: str, sampler: Sampler, output: str, iterations: int) -> dict[str, Any]:
    """Fit `teacher`, write its file and report into `output`, and return the report.

    Raises UserError if `output` holds another teacher or cannot be written, and if there is too
    little music.
    """
    check_writable(output)
    file = os.path.join(output, fitted_file.FILE)
    if os.path.exists(file) and (other := fitted_file.read_header(file)["teacher"]) != teacher:
        raise UserError(
            f"{file} holds teacher {other!r}; give another --output for {teacher!r}, or remove it"
        )
    started = time.monotonic()
    fitted = FITTERS[teacher](sampler, iterations)
    fingerprint = sampler.metadata["fingerprint"]
    settings = dict(fitted.settings) | {"seed": sampler.seed, "fingerprint": fingerprint}
    report = {
        "teacher": teacher,
        "settings": settings,
        "frames": {split: sampler.available(split) for split in fitted.figures},
        "iterations": iterations,
        "seconds": round(time.monotonic() - started, 1),
        "figures": {s: [b._asdict() for b in books] for s, books in fitted.figures.items()},
    }
    fitted_file.write_fitted(output, teacher, fitted.tensors, settings)
    picture = figures.png(fitted.figures, f"{teacher}, {report['frames']['train']} frames")
    text = json.dumps(report, indent=1) + "\n"
    for name, content in (("report.json", text.encode()), ("report.png", picture)):
        report_file = os.path.join(output, name)
        with atomic_write(report_file, replace=True) as path, open(path, "wb") as opened:
            opened.write(content)
    print(figures.table(fitted.figures))
    return report


def check_writable(output: str) -> None:
    """Raise UserError before minutes of fitting if `output` cannot be written."""
    if "://" in output:
        raise UserError(f"--output={output}: give a directory of a local disk, and copy it later")
    existing = os.path.abspath(output)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write {output}: {existing} is not a writable directory")
