"""Metrics of a step: from sums to rows, the console line, the speed, and metrics.jsonl."""

import datetime
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mert_jax import hardware
from mert_jax.data.code_checks import perplexity
from mert_jax.errors import UserError
from mert_jax.files import JsonlFile
from mert_jax.pretraining.losses import CodeLoss
from mert_jax.pretraining.step import Sums


def _per_book(codes: Sequence[CodeLoss], value: Callable) -> list[float | None]:
    return [
        round(float(x), 6) if drawn else None
        for c in codes
        for x, drawn in zip(value(c), c.targets.any(-1), strict=True)
    ]


def _loss_codes(c: CodeLoss, frames: float) -> float:
    """Return the cross-entropy over all codebooks; those not drawn count as the mean."""
    drawn = c.targets.any(-1)
    return float(c.cross_entropy.sum() / frames * len(drawn) / max(drawn.sum(), 1))


def to_row(sums: Sums) -> dict[str, Any]:
    """Return means over masked frames, losses in nats, with lists of one entry a codebook.

    `code_perplexity` is low for a collapsed teacher, `prediction_perplexity` for a collapsed
    student; `majority_accuracy` is that of always guessing the most frequent target. Entries of
    codebooks that were not drawn are None.
    """
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    frames = sums.frames
    codes = list(sums.codes.values())
    row = {
        "loss": float(sums.loss / frames),
        "loss_codes": sum(_loss_codes(c, frames) for c in codes),
        **{f"loss_{name}": float(value / frames) for name, value in sums.features.items()},
        "features_penalty": float(sums.penalty / frames),
        "masked_accuracy": _per_book(codes, lambda c: c.correct / frames),
        "majority_accuracy": _per_book(codes, lambda c: c.targets.max(-1) / frames),
        "code_perplexity": _per_book(codes, lambda c: perplexity(c.targets)),
        "prediction_perplexity": _per_book(codes, lambda c: perplexity(c.predictions)),
    }
    if sums.unmasked is not None:
        row["loss_codes_visible"] = float(sums.unmasked / frames)
    if len(codes) > 1:
        for name, c in sums.codes.items():
            row[f"loss_codes_{name}"] = _loss_codes(c, frames)
    return row


def add(total: Sums, sums: Sums) -> Sums:
    """Return the sum of two `Sums`, in float64."""
    total, sums = jax.device_get((total, sums))
    return jax.tree.map(lambda a, b: np.add(a, b, dtype=np.float64), total, sums)


def validation_row(sums: Sequence[Sums]) -> dict[str, Any]:
    """Return `to_row` over all datasets' `sums`, and the loss of each if there are several."""
    row = {f"validation_{name}": x for name, x in to_row(functools.reduce(add, sums)).items()}
    if len(sums) > 1:
        row["validation_losses"] = [to_row(each)["loss"] for each in sums]
    return row


def mfu(flops_per_second: float) -> float | None:
    """Return model FLOP/s as a fraction of all devices' peak, None if that is unknown (CPU)."""
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    return flops_per_second / (peak * jax.device_count()) if peak else None


class Speed:
    """Measures audio seconds per second, model FLOPs utilisation and the time left."""

    def __init__(self, start: int, total_steps: int, audio_seconds: float, flops: float):
        self._total, self._audio, self._flops = total_steps, audio_seconds, flops
        self._step, self._time, self._rate = start, None, 0.0

    def measure(self, step: int) -> dict[str, float | None]:
        """Return the rates since the last call, for metrics.jsonl."""
        now = time.monotonic()
        if self._time is not None and step > self._step:  # the first time includes compilation
            self._rate = (step - self._step) / (now - self._time)
        self._step, self._time = step, now
        utilisation = mfu(self._rate * self._flops) if self._rate else None
        return {"audio_seconds_per_second": self._rate * self._audio, "mfu": utilisation}

    def pause(self) -> None:
        """Leave out the time since `measure`, which was spent on validation or a save."""
        self._time = time.monotonic()

    def eta(self, step: int) -> str:
        """Return the time left, h:mm:ss."""
        if not self._rate:
            return "?"
        return str(datetime.timedelta(seconds=round((self._total - step) / self._rate)))


def mean(values: Sequence[float | None]) -> float:
    """Return the mean of the numbers in a list, 0 if there are none."""
    known = [x for x in values if x is not None]
    return sum(known) / max(len(known), 1)


def console_line(row: dict[str, Any], total_steps: int, eta: str) -> str:
    """Return the console line of a row of metrics.jsonl."""

    def each(name: str, form: str) -> str:
        return " ".join("-" if x is None else f"{x:{form}}" for x in row[name])

    features = " ".join(
        f"{name.removeprefix('loss_')} {row[name]:.4f}"
        for name in row
        if name.startswith("loss_") and not name.startswith("loss_codes")
    )
    visible = f" + {row['loss_codes_visible']:.3f}" if "loss_codes_visible" in row else ""
    line = (
        f"step {row['step']}/{total_steps}  loss {row['loss']:.3f} = codes {row['loss_codes']:.3f}"
        f"{visible} {features} penalty {row['features_penalty']:.4f}"
        f"  accuracy [{each('masked_accuracy', '.2f')}]"
        f"  perplexity [{each('code_perplexity', '.0f')}]"
        f"  lr {row['learning_rate']:.2e}  {row['audio_seconds_per_second']:.0f} s/s  eta {eta}"
    )
    if "validation_loss" in row:
        by_dataset = f" ({each('validation_losses', '.3f')})" if "validation_losses" in row else ""
        line += (
            f"\n  validation loss {row['validation_loss']:.3f}{by_dataset}, masked accuracy"
            f" {mean(row['validation_masked_accuracy']):.4f} (always the most frequent code:"
            f" {mean(row['validation_majority_accuracy']):.4f})"
        )
    return line


class Writer:
    """Appends rows to WORKDIR/metrics.jsonl and, with the extra, to TensorBoard, if it `writes`.

    Lines after step `start` are dropped, so that a resumed run has each step once.
    """

    def __init__(self, workdir: str, start: int, tensorboard: bool, writes: bool = True):
        path = os.path.join(workdir, "metrics.jsonl") if writes else None
        self._file, self._board = JsonlFile(path, lambda row: row["step"] <= start), None
        if tensorboard and writes:
            try:
                from clu import metric_writers  # imports TensorFlow
            except ImportError as e:
                extra = "pip install -e .[tensorboard]"
                raise UserError(f"tensorboard=True needs an extra: {extra} ({e})") from e
            self._board = metric_writers.SummaryWriter(os.path.join(workdir, "tensorboard"))

    def back_to(self, step: int) -> None:
        """Drop the lines after `step`, which will be written again."""
        self._file.drop(lambda row: row["step"] <= step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; lists become one TensorBoard scalar an entry."""
        self._file.write(row)
        if self._board:
            scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            for name in row:
                if isinstance(row[name], list):
                    scalars |= {f"{name}/{i}": v for i, v in enumerate(row[name])}
            self._board.write_scalars(row["step"], scalars)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
