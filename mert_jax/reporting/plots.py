"""Curves of a run: rows of metrics.jsonl -> panels -> a picture. Shapes: R rows, K codebooks."""

import io
import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, figure, ticker

from mert_jax.errors import UserError

# Okabe and Ito's colours and viridis can be told apart by the colour-blind
TRAIN, VALIDATION, BASELINE = "#0072B2", "#D55E00", "#444444"
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SPEED = "audio_seconds_per_second"
POINTS = 500  # of a curve: more cannot be told apart at the size of a panel


class Line(NamedTuple):
    """One curve: steps [R], values [R] and, where they are means, the least and greatest [R]."""

    label: str
    color: Any
    width: float
    dash: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Panel(NamedTuple):
    """One plot, whose first lines are those of its `codebooks`, thin and below the others.

    axis of y: "zero" (from 0), "log", "codes" (logarithmic, from one code), "" (as the values are).
    """

    title: str
    unit: str
    lines: list[Line]
    axis: str = ""
    codebooks: int = 0


def series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [R] and values [R, K] of rows with `name` (K = 1: a number), NaN if infinite."""
    # a rate of 0 is that of the first row, which includes compilation
    rows = [row for row in rows if name in row and (name != SPEED or row[name])]
    try:
        values = np.array([row[name] for row in rows], np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"metrics.jsonl: {name} is not as many numbers in every row") from e
    values = np.where(np.isfinite(values), values, np.nan)
    return np.array([row["step"] for row in rows]), values if values.ndim > 1 else values[:, None]


def curve(steps: np.ndarray, values: np.ndarray, label, color, width=1.3, dash="-") -> Line:
    """Return `values` [R] as a Line of at most POINTS means."""
    if len(steps) <= POINTS:
        return Line(label, color, width, dash, steps, values)
    edges = np.linspace(0, len(steps), POINTS + 1).astype(int)[:-1]
    counts = np.add.reduceat(~np.isnan(values), edges, dtype=float)
    counts[counts == 0] = np.nan
    means = np.add.reduceat(np.nan_to_num(values), edges) / counts
    low, high = np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)
    return Line(label, color, width, dash, steps[edges], means, low, high)


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Return the panels of a run in reading order, without those that have no number."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def mean(name: str, *style, rows: list[dict[str, Any]] = rows) -> list[Line]:
        steps, values = series(rows, name)
        return [curve(steps, values.mean(-1), *style)] if values.size else []

    def both(name: str) -> list[Line]:
        validation = mean(f"validation_{name}", "validation", VALIDATION, 2.2)
        return mean(name, "training", TRAIN) + validation

    def books(title: str, unit: str, name: str, axis: str, *extra: Line) -> Panel:
        steps, values = series(rows, name)
        shades = colormaps["viridis"](np.linspace(0, 0.9, values.shape[1]))
        pairs = zip(values.T, shades, strict=True)
        lines = [curve(steps, v, "_", shade, 1.1) for v, shade in pairs]
        return Panel(title, unit, [*lines, *extra], axis, len(lines))

    def datasets(name: str = "validation_losses") -> list[Line]:
        validated, lines = [row for row in rows if name in row], []
        most = max((len(row[name]) for row in validated), default=0)  # one may have come later
        for k in range(most):
            losses = [row | {name: (row[name] + [None] * most)[k]} for row in validated]
            lines += mean(name, f"dataset {k + 1}", OTHERS[k % len(OTHERS)], 1.8, rows=losses)
        return lines

    codes = both("loss_codes")
    for i, name in enumerate(name for name in names if name.startswith("loss_codes_")):
        codes += mean(name, name.removeprefix("loss_codes_"), OTHERS[i % len(OTHERS)])
    features = [x for x in names if x.startswith("loss_") and not x.startswith("loss_codes")]
    prefix = "validation_" if "validation_masked_accuracy" in names else ""
    kind = "mean, validation" if prefix else "mean, training"
    accuracy = mean(f"{prefix}masked_accuracy", kind, VALIDATION, 2.6)
    accuracy += mean(f"{prefix}majority_accuracy", "most frequent code", BASELINE, 1.8, "--")
    candidates = [
        Panel("Loss", "a masked frame", both("loss")),
        Panel("Validation loss of each dataset", "in the order of data.dir", datasets()),
        Panel("Loss of the codes", "nats, all codebooks", codes),
        *(Panel(f"Loss of {x.removeprefix('loss_')}", "squared error", both(x)) for x in features),
        books("Masked accuracy", "share of frames", "masked_accuracy", "zero", *accuracy),
        books("Perplexity of the targets", "codes in use", "code_perplexity", "codes"),
        books("Perplexity of the predictions", "codes in use", "prediction_perplexity", "codes"),
        Panel("Features penalty", "mean square", both("features_penalty")),
        Panel("Gradient norm", "before clipping", mean("grad_norm", "", TRAIN), "log"),
        Panel("Learning rate", "", mean("learning_rate", "", TRAIN), "zero"),
        Panel("Model FLOPs utilisation", "share of peak", mean("mfu", "", TRAIN), "zero"),
        Panel("Speed", "seconds of audio a second", mean(SPEED, "", TRAIN), "zero"),
    ]
    return [x for x in candidates if any(np.isfinite(line.values).any() for line in x.lines)]


def draw(axes: Any, panel: Panel, last_step: int) -> None:
    """Draw a panel on matplotlib axes, steps from 0 to `last_step`."""
    for i, line in enumerate(panel.lines):
        # a single point has no line
        marker = dict(marker="o", ms=2 + line.width) if len(line.steps) <= 40 else {}
        style = dict(color=line.color, lw=line.width, ls=line.dash, label=line.label, **marker)
        axes.plot(line.steps, line.values, zorder=3 + (i >= panel.codebooks), **style)
        if line.low is not None and not panel.codebooks:
            axes.fill_between(line.steps, line.low, line.high, color=line.color, alpha=0.2, lw=0)
    values = np.concatenate([line.values for line in panel.lines])
    low, high = np.nanmin(values), np.nanmax(values)
    # a logarithmic axis has hardly a tick in a narrow range
    narrow = {"log": 3, "": 30}.get(panel.axis, math.inf)
    if panel.axis == "codes" or (low > 0 and high > narrow * low):
        subs = (1, 2, 5) if high < 30 * low and panel.axis != "codes" else (1,)
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=ticker.LogLocator(subs=subs), minor_formatter="")
        axes.yaxis.set_major_formatter("{x:g}")
    if panel.axis == "codes":
        axes.set_ylim(0.9, max(10, 1.5 * high))  # down to one code, that is collapse
    elif panel.axis == "zero":
        axes.set_ylim(bottom=0)
    if panel.codebooks:
        shades = np.array([line.color for line in panel.lines[: panel.codebooks]])
        key = axes.inset_axes((1.02, 0, 0.025, 1))
        key.imshow(shades[:, None], aspect="auto", origin="lower")
        key.set_title("codebook", loc="right", fontsize=8.5)
        key.yaxis.set(ticks_position="right", major_locator=ticker.MaxNLocator(8, integer=True))
        key.tick_params(bottom=False, labelbottom=False, labelsize=8, length=0)
        key.spines[:].set_visible(False)
    if len(panel.lines) > (panel.codebooks or 1):
        axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlim=(0, last_step * 1.02), xlabel="step", ylabel=panel.unit, axisbelow=True)
    few_ticks = ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10])
    axes.xaxis.set(major_locator=few_ticks, major_formatter=ticker.EngFormatter(sep=""))
    axes.tick_params(which="both", labelsize=8.5, color="#bbbbbb")
    axes.grid(color="#e8e8e8", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


def png(
    panels: list[Panel], last_step: int, title: str = "", columns: int = 3, width: float = 5.2
) -> bytes:
    """Return a picture of panels, each `width` inches wide; the last one fills its row."""
    heights = [1.0] * -(-len(panels) // columns)
    if len(panels) % columns == 1 < columns:
        heights[-1] = 0.6  # one wide panel needs no more
    size = (width * columns, 0.66 * width * sum(heights) + 0.5 * bool(title))
    picture = figure.Figure(size, layout="constrained")
    grid = picture.add_gridspec(len(heights), columns, height_ratios=heights)
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        right = columns if panel is panels[-1] else column + 1
        draw(picture.add_subplot(grid[row, column:right]), panel, last_step)
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=700 / width)
    return buffer.getvalue()
