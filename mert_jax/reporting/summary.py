"""The headline figures of a run, and warnings about a run that does not learn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mert_jax.constants import CONFIG_FILE, SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.files import Row, read_jsonl
from mert_jax.pretraining import metrics
from mert_jax.reporting.plots import SPEED, series

# the metrics with one value a codebook, and the heading of each in the table
PER_CODEBOOK = {
    "masked_accuracy": "accuracy",
    "majority_accuracy": "most frequent code",
    "code_perplexity": "perplexity of targets",
    "prediction_perplexity": "of predictions",
}


def read_run(workdir: str) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of WORKDIR/metrics.jsonl and the config, {} without config.json."""
    path, config_path = Path(workdir, "metrics.jsonl"), Path(workdir, CONFIG_FILE)
    if not path.exists():
        raise UserError(f"{path} is not there: has mert_jax.train run in this workdir?")
    try:
        rows = read_jsonl(str(path))
        config = json.loads(config_path.read_text()) if config_path.exists() else {}
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir={workdir} cannot be read: {e}") from e
    if not rows:
        raise UserError(f"{path} is empty: no step has been logged yet")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}: line {number} is not the metrics of a step")
    return rows, config


def summarize(rows: list[Row], config: dict[str, Any]) -> dict[str, Any]:
    """Return the headline figures, None if missing, those of codebooks from the last validation."""
    steps, losses = (x.ravel().tolist() for x in series(rows, "validation_loss"))
    points = list(zip(steps, losses, strict=True))
    finite = [point for point in points if not math.isnan(point[1])]
    kind, prefix = ("validation", "validation_") if points else ("training", "")
    row = next(row for row in reversed(rows) if f"{prefix}loss" in row or not prefix)
    speeds = series(rows, SPEED)[1]
    clip_seconds = config.get("data", {}).get("num_samples", 0) / SAMPLE_RATE
    update_hours = config.get("batch_size", 0) * clip_seconds / 3600
    return {
        "step": rows[-1]["step"],
        "total_steps": config.get("total_steps"),
        "hours": rows[-1]["step"] * update_hours or None,
        "speed": float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None,
        "loss": rows[-1].get("loss"),
        "first": finite[0] if finite else None,
        "best": min(finite, key=lambda point: point[1], default=None),
        "last": points[-1] if points else None,
        "kind": kind,
        "kind_step": row["step"],
        **{name: series([row], prefix + name)[1].ravel().tolist() for name in PER_CODEBOOK},
    }


def list_warnings(rows: list[Row], figures: dict[str, Any]) -> list[str]:
    """Return one sentence for each problem of the run."""
    used, predicted = figures["code_perplexity"], figures["prediction_perplexity"]
    accuracies = zip(figures["masked_accuracy"], figures["majority_accuracy"], strict=False)
    student = "Collapsed student: it predicts hardly more than one code"
    guess = "accuracy does not exceed that of always guessing the most frequent code"
    problems = {
        "Collapsed teacher: fewer than 2 codes are in use": [x < 2 for x in used],
        # relative to the targets: with more codes in use, a student must predict more of them
        student: [p < max(1.5, 0.02 * x) for p, x in zip(predicted, used, strict=False)],
        f"The {figures['kind']} {guess}": [x <= y for x, y in accuracies],
    }
    warnings = []
    for problem, flags in problems.items():
        if any(flags):
            books = ", ".join(str(k) for k, flag in enumerate(flags) if flag)
            warnings.append(f"{problem} in codebook {books}.")
    for name in ("loss", "grad_norm", "validation_loss"):
        steps, values = series(rows, name)
        if missing := np.isnan(values).any(-1).sum():
            warnings.append(f"{name} is not finite in {missing} of {len(steps)} rows.")
    return warnings


def headline(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures as pairs of a label and a formatted value."""

    def number(x: Any, form: str) -> str:
        return format(x, form) if isinstance(x, int | float) else "unknown"

    def loss_at(point: tuple[int, float] | None) -> str:
        return f"{point[1]:.4g} at step {point[0]:,}" if point else "none"

    return [
        ("steps", f"{figures['step']:,} of {number(figures['total_steps'], ',')}"),
        ("audio seen", f"{number(figures['hours'], ',.1f')} h"),
        ("median speed", f"{number(figures['speed'], ',.0f')} s of audio a second"),
        ("last training loss", number(figures["loss"], ".4g")),
        *((f"{x} validation loss", loss_at(figures[x])) for x in ("first", "best", "last")),
        (f"{figures['kind']} masked accuracy", f"{metrics.mean(figures['masked_accuracy']):.4f}"),
        ("always the most frequent code", f"{metrics.mean(figures['majority_accuracy']):.4f}"),
    ]
