"""From sums to the numbers people read, and where they are written."""

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


def drawn(c: CodeLoss) -> np.ndarray:
    """Which books were trained on, bool [K]: all, but for a subset a step."""
    return c.targets.sum(-1) > 0


def per_book(
    codes: Sequence[CodeLoss], value: Callable[[CodeLoss], np.ndarray]
) -> list[float | None]:
    """`value` of the sums for each book; None for one that was not drawn."""
    return [
        round(float(x), 6) if was_drawn else None
        for c in codes
        for x, was_drawn in zip(value(c), drawn(c), strict=True)
    ]


def loss_codes(c: CodeLoss, frames: float) -> float:
    """Cross-entropy a frame summed over books, nats; those that were not drawn count as the mean of
    the others."""
    return float(c.cross_entropy.sum() / frames * len(drawn(c)) / max(drawn(c).sum(), 1))


def reduce(sums: Sums) -> dict[str, Any]:
    """Means over masked frames, in nats; lists have one entry a codebook, teachers by name.

    `code_perplexity` is the targets', `prediction_perplexity` the student's: a collapsed teacher
    shows in the first, a collapsed student in the second. `majority_accuracy` is what always
    guessing each codebook's most frequent target of these same frames would have got. A codebook
    that was not drawn in this step has None.
    """
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    frames = sums.frames
    codes = list(sums.codes.values())
    row = {
        "loss": float(sums.loss / frames),
        "loss_codes": sum(loss_codes(c, frames) for c in codes),
        **{f"loss_{name}": float(value / frames) for name, value in sums.features.items()},
        "features_penalty": float(sums.penalty / frames),
        "masked_accuracy": per_book(codes, lambda c: c.correct / frames),
        "majority_accuracy": per_book(codes, lambda c: c.targets.max(-1) / frames),
        "code_perplexity": per_book(codes, lambda c: perplexity(c.targets)),
        "prediction_perplexity": per_book(codes, lambda c: perplexity(c.predictions)),
    }
    if sums.visible is not None:
        row["loss_codes_visible"] = float(sums.visible / frames)
    if len(codes) > 1:
        for name, c in sums.codes.items():
            row[f"loss_codes_{name}"] = loss_codes(c, frames)
    return row


def add(total: Sums | None, sums: Sums) -> Sums:
    """Sum of two `Sums`; None is zero."""
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    return sums if total is None else jax.tree.map(np.add, total, sums)


def validation(sums: Sequence[Sums]) -> dict[str, Any]:
    """`reduce` of all records of the datasets' `sums`, each name after "validation_".

    `validation_losses`, where there are several datasets, is the loss of each.
    """
    row = {f"validation_{name}": x for name, x in reduce(functools.reduce(add, sums)).items()}
    if len(sums) > 1:
        row["validation_losses"] = [reduce(each)["loss"] for each in sums]
    return row


def mfu(flops_per_second: float) -> float | None:
    """Model FLOP/s as a share of all devices' peak, None where the peak is unknown (CPU)."""
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    return flops_per_second / (peak * jax.device_count()) if peak else None


class Speed:
    """Audio seconds per second, model FLOPs utilisation and time left, from step to step.

    The first measurement after a start or a pause has compilation in it and only sets the clock.
    """

    def __init__(self, start: int, total_steps: int, audio_seconds: float, flops: float):
        self._total, self._audio, self._flops = total_steps, audio_seconds, flops
        self._step, self._time, self._rate = start, None, 0.0

    def measure(self, step: int) -> dict[str, float | None]:
        """The rates since the last call, for metrics.jsonl."""
        now = time.monotonic()
        if self._time is not None and step > self._step:
            self._rate = (step - self._step) / (now - self._time)
        self._step, self._time = step, now
        flops = mfu(self._rate * self._flops) if self._rate else None
        return {"audio_seconds_per_second": self._rate * self._audio, "mfu": flops}

    def pause(self) -> None:
        """Leave out what happened since `measure`, such as validation."""
        self._time = time.monotonic()

    def eta(self, step: int) -> str:
        """Time left, h:mm:ss."""
        if not self._rate:
            return "?"
        return str(datetime.timedelta(seconds=round((self._total - step) / self._rate)))


def mean(values: Sequence[float | None]) -> float:
    """Mean of the numbers in a list, 0 where there is none."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else 0.0


def console_line(row: dict[str, Any], total_steps: int, eta: str) -> str:
    """One line of `row` for people."""
    each = lambda name, form: " ".join("-" if x is None else f"{x:{form}}" for x in row[name])
    books, used = (functools.partial(each, form=form) for form in (".2f", ".0f"))
    features = " ".join(
        f"{name.removeprefix('loss_')} {row[name]:.4f}"
        for name in row
        if name.startswith("loss_") and not name.startswith("loss_codes")
    )
    visible = f" + {row['loss_codes_visible']:.3f}" if "loss_codes_visible" in row else ""
    line = (
        f"step {row['step']}/{total_steps}  loss {row['loss']:.3f} = codes {row['loss_codes']:.3f}"
        f"{visible} {features} penalty {row['features_penalty']:.4f}"
        f"  accuracy [{books('masked_accuracy')}]  perplexity [{used('code_perplexity')}]"
        f"  lr {row['learning_rate']:.2e}  {row['audio_seconds_per_second']:.0f} s/s  eta {eta}"
    )
    if "validation_loss" in row:
        own = f" ({each('validation_losses', '.3f')})" if "validation_losses" in row else ""
        line += (
            f"\n  validation loss {row['validation_loss']:.3f}{own}, masked accuracy"
            f" {mean(row['validation_masked_accuracy']):.4f} (always the most frequent code:"
            f" {mean(row['validation_majority_accuracy']):.4f})"
        )
    return line


class Writer:
    """Appends rows to WORKDIR/metrics.jsonl and, with the extra, TensorBoard.

    Lines after step `start` are dropped, so that a resumed run has each step once.
    """

    def __init__(self, workdir: str, start: int, tensorboard: bool):
        self._ledger = JsonlFile(
            os.path.join(workdir, "metrics.jsonl"), lambda row: row["step"] <= start
        )
        self._board = None
        if tensorboard:
            try:
                from clu import metric_writers  # imports TensorFlow
            except ImportError as e:
                raise UserError(
                    f"tensorboard=True needs an extra: pip install -e .[tensorboard] ({e})"
                ) from e
            self._board = metric_writers.SummaryWriter(os.path.join(workdir, "tensorboard"))

    def back_to(self, step: int) -> None:
        """Drop the lines after `step`, which will come again."""
        self._ledger.drop(lambda row: row["step"] <= step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; lists become one TensorBoard scalar an entry."""
        self._ledger.write(row)
        if self._board:
            scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            for name, values in row.items():
                if isinstance(values, list):
                    scalars |= {f"{name}/{i}": v for i, v in enumerate(values)}
            self._board.write_scalars(row["step"], scalars)

    def close(self) -> None:
        self._ledger.close()
        if self._board:
            self._board.close()
