"""The headline figures of a run, and warnings about a run that does not learn."""

import json
import math
import os
from typing import Any

import numpy as np

from mert_jax.constants import CONFIG_FILE, SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.files import read_jsonl
from mert_jax.pretraining import metrics
from mert_jax.reporting.plots import SPEED, series

Row = dict[str, Any]
# the metrics with one value a codebook, and the heading of each in the table
PER_CODEBOOK = {
    "masked_accuracy": "accuracy",
    "majority_accuracy": "most frequent code",
    "code_perplexity": "perplexity of targets",
    "prediction_perplexity": "of predictions",
}


def read_run(workdir: str) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of WORKDIR/metrics.jsonl and the config, {} without config.json.

    Raises UserError without rows, and for a file that cannot be read.
    """
    if not os.path.isdir(workdir):
        raise UserError(f"--workdir={workdir} is not a directory")
    path, config_path = (os.path.join(workdir, name) for name in ("metrics.jsonl", CONFIG_FILE))
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: has mert_jax.train run in this workdir?")
    try:
        rows, config = read_jsonl(path), {}
        if os.path.exists(config_path):
            with open(config_path) as f:
                config = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir={workdir} cannot be read: {e}") from e
    if not rows:
        raise UserError(f"{path} is empty: no step has been logged yet")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}: line {number} is not the metrics of a step")
    if not isinstance(config, dict):
        raise UserError(f"{config_path} is not the config of a run")
    return rows, config


def summarize(rows: list[Row], config: dict[str, Any]) -> dict[str, Any]:
    """Return the headline figures, None for those that the run lacks.

    Accuracies and perplexities are lists with one entry a codebook, from the last validation or,
    without one, from the last logged step.
    """
    steps, losses = (x.ravel().tolist() for x in series(rows, "validation_loss"))
    points = list(zip(steps, losses, strict=True))
    finite = [point for point in points if not math.isnan(point[1])]
    prefix = "validation_" if points else ""
    row = next(row for row in reversed(rows) if f"{prefix}loss" in row or not prefix)
    speeds = series(rows, SPEED)[1]
    step, batch_size = rows[-1]["step"], config.get("batch_size")
    num_samples = config.get("data", {}).get("num_samples")
    clip_hours = batch_size and num_samples and batch_size * num_samples / SAMPLE_RATE / 3600
    return {
        "step": step,
        "total_steps": config.get("total_steps"),
        "hours": step * clip_hours if clip_hours else None,
        "speed": float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None,
        "loss": rows[-1].get("loss"),
        "first": finite[0] if finite else None,
        "best": min(finite, key=lambda point: point[1], default=None),
        "last": points[-1] if points else None,
        "kind": "validation" if prefix else "training",
        "kind_step": row["step"],
        **{name: series([row], prefix + name)[1].ravel().tolist() for name in PER_CODEBOOK},
    }


def list_warnings(rows: list[Row], figures: dict[str, Any]) -> list[str]:
    """Return one sentence for each problem of the run."""

    def codebooks(flags) -> str:
        return ", ".join(str(k) for k, flag in enumerate(flags) if flag)

    warnings = []
    used, predicted = figures["code_perplexity"], figures["prediction_perplexity"]
    if k := codebooks(x < 2 for x in used):
        warnings.append(f"Collapsed teacher: fewer than 2 codes are in use in codebook {k}.")
    # relative to the targets: with more codes in use, a student must predict more of them
    if k := codebooks(p < max(1.5, 0.02 * x) for p, x in zip(predicted, used, strict=False)):
        warnings.append(
            f"Collapsed student: it predicts hardly more than one code in codebook {k}."
        )
    pairs = zip(figures["masked_accuracy"], figures["majority_accuracy"], strict=False)
    if k := codebooks(x <= guess for x, guess in pairs):
        warnings.append(
            f"The {figures['kind']} accuracy is no better than always guessing the most frequent "
            f"code in codebook {k}."
        )
    for name in ("loss", "grad_norm", "validation_loss"):
        steps, values = series(rows, name)
        if missing := np.isnan(values).any(-1).sum():
            warnings.append(f"{name} is not finite in {missing} of {len(steps)} rows.")
    return warnings


def headline(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures as pairs of a label and a formatted value."""

    def loss_at(point: tuple[int, float] | None) -> str:
        return f"{point[1]:.4g} at step {point[0]:,}" if point else "none"

    def number(x: Any, form: str) -> str:
        return format(x, form) if isinstance(x, int | float) else "unknown"

    return [
        ("steps", f"{figures['step']:,} of {number(figures['total_steps'], ',')}"),
        ("audio seen", f"{number(figures['hours'], ',.1f')} h"),
        ("median speed", f"{number(figures['speed'], ',.0f')} s of audio a second"),
        ("last training loss", number(figures["loss"], ".4g")),
        ("first validation loss", loss_at(figures["first"])),
        ("best validation loss", loss_at(figures["best"])),
        ("last validation loss", loss_at(figures["last"])),
        (f"{figures['kind']} masked accuracy", f"{metrics.mean(figures['masked_accuracy']):.4f}"),
        ("always the most frequent code", f"{metrics.mean(figures['majority_accuracy']):.4f}"),
    ]
