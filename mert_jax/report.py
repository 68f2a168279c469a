"""Curves and figures of a run: `python -m mert_jax.report --workdir=DIR`.

Reads DIR/metrics.jsonl and DIR/config.json; writes DIR/report.png and DIR/report.html, one file
that opens without a network.

Shapes: R rows, K codebooks.
"""

import base64
import html
import io
import json
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from matplotlib import colormaps, figure, ticker

from mert_jax import cli, metrics
from mert_jax.decode import SAMPLE_RATE

# Okabe and Ito's colours and viridis can be told apart by the colour-blind
TRAIN, VALIDATION, BASELINE = "#0072B2", "#D55E00", "#444444"
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SPEED = "audio_seconds_per_second"
POINTS = 500  # of a curve: more cannot be told apart at the size of a panel

PER_BOOK = {
    "masked_accuracy": "accuracy",
    "majority_accuracy": "most frequent code",
    "code_perplexity": "perplexity of targets",
    "prediction_perplexity": "of predictions",
}


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
    """One plot; the first `books` lines are those of codebooks; the axis of y is "zero" (linear,
    from 0), "log", "codes" (logarithmic, from one code) or as the values are."""

    title: str
    unit: str
    lines: list[Line]
    axis: str = ""
    books: int = 0


def load(workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl and its config, {} where there is no config.json.

    Raises UserError when there are no rows or a file cannot be read.
    """
    if not os.path.isdir(workdir):
        raise cli.UserError(f"--workdir={workdir} is not a directory")
    path, config_path = (os.path.join(workdir, name) for name in ("metrics.jsonl", "config.json"))
    if not os.path.exists(path):
        raise cli.UserError(f"{path} is not there: has mert_jax.train run in this workdir?")
    try:
        rows, config = metrics.read(path), {}
        if os.path.exists(config_path):
            with open(config_path) as f:
                config = json.load(f)
    except (OSError, ValueError) as e:
        raise cli.UserError(f"--workdir={workdir} cannot be read: {e}") from e
    if not rows:
        raise cli.UserError(f"{path} is empty: no step has been logged yet")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise cli.UserError(f"{path}: line {number} is not the metrics of a step")
    if not isinstance(config, dict):
        raise cli.UserError(f"{config_path} is not the config of a run")
    return rows, config


def series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [R] and values [R, K] of the rows that have `name`; K is 1 for a plain number.

    What is null or not finite becomes NaN. Raises UserError for anything but numbers.
    """
    # a rate of 0 is that of the first row, which has compilation in it
    have = [row for row in rows if name in row and (name != SPEED or row[name])]
    try:
        values = np.array([row[name] for row in have], np.float64)
    except (TypeError, ValueError) as e:
        raise cli.UserError(f"metrics.jsonl: {name} is not as many numbers everywhere") from e
    values = np.where(np.isfinite(values), values, np.nan)
    return np.array([row["step"] for row in have]), values if values.ndim > 1 else values[:, None]


def curve(steps: np.ndarray, values: np.ndarray, label, color, width=1.3, dash="-") -> Line:
    """`values` [R] as a Line of at most POINTS means."""
    if len(steps) <= POINTS:
        return Line(label, color, width, dash, steps, values)
    edges = np.linspace(0, len(steps), POINTS + 1).astype(int)[:-1]
    known = np.add.reduceat(~np.isnan(values), edges, dtype=float)
    known[known == 0] = np.nan
    mean = np.add.reduceat(np.nan_to_num(values), edges) / known
    low, high = np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)
    return Line(label, color, width, dash, steps[edges], mean, low, high)


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """What there is to plot, in reading order; a panel without any number is left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def mean(name: str, *style) -> list[Line]:
        steps, values = series(rows, name)
        return [curve(steps, values.mean(-1), *style)] if values.size else []

    def both(name: str) -> list[Line]:
        validation = mean(f"validation_{name}", "validation", VALIDATION, 2.2)
        return mean(name, "training", TRAIN) + validation

    def books(title: str, unit: str, name: str, axis: str, *extra: Line) -> Panel:
        steps, values = series(rows, name)
        shades = colormaps["viridis"](np.linspace(0, 0.9, values.shape[1]))
        lines = [curve(steps, v, "_", shades[k], 1.1) for k, v in enumerate(values.T)]
        return Panel(title, unit, [*lines, *extra], axis, len(lines))

    codes = both("loss_codes")
    for i, name in enumerate(name for name in names if name.startswith("loss_codes_")):
        codes += mean(name, name.removeprefix("loss_codes_"), OTHERS[i % len(OTHERS)])
    prefix = "validation_" if "validation_masked_accuracy" in names else ""
    kind = "validation" if prefix else "training"
    accuracy = mean(f"{prefix}masked_accuracy", f"mean, {kind}", VALIDATION, 2.6)
    guess = mean(f"{prefix}majority_accuracy", "most frequent code", BASELINE, 1.8, "--")
    made = [
        Panel("Loss", "a masked frame", both("loss")),
        Panel("Loss of the codes", "nats, all codebooks", codes),
        *(
            Panel(f"Loss of {name.removeprefix('loss_')}", "squared error", both(name))
            for name in names
            if name.startswith("loss_") and not name.startswith("loss_codes")
        ),
        books("Masked accuracy", "share of frames", "masked_accuracy", "zero", *accuracy, *guess),
        books("Perplexity of the targets", "codes in use", "code_perplexity", "codes"),
        books("Perplexity of the predictions", "codes in use", "prediction_perplexity", "codes"),
        Panel("Features penalty", "mean square", both("features_penalty")),
        Panel("Gradient norm", "before clipping", mean("grad_norm", "", TRAIN), "log"),
        Panel("Learning rate", "", mean("learning_rate", "", TRAIN), "zero"),
        Panel("Model FLOPs utilisation", "share of peak", mean("mfu", "", TRAIN), "zero"),
        Panel("Speed", "seconds of audio a second", mean(SPEED, "", TRAIN), "zero"),
    ]
    return [p for p in made if any(np.isfinite(line.values).any() for line in p.lines)]


def draw(axes: Any, panel: Panel, last_step: int) -> None:
    """Draw `panel` on matplotlib `axes`, steps from 0 to `last_step`."""
    for i, line in enumerate(panel.lines):
        # a single point has no line
        marker = dict(marker="o", ms=2 + line.width) if len(line.steps) <= 40 else {}
        style = dict(color=line.color, lw=line.width, ls=line.dash, **marker)
        axes.plot(line.steps, line.values, label=line.label, zorder=3 + (i >= panel.books), **style)
        if line.low is not None and not panel.books:
            axes.fill_between(line.steps, line.low, line.high, color=line.color, alpha=0.2, lw=0)
    values = np.concatenate([line.values for line in panel.lines])
    low, high = np.nanmin(values), np.nanmax(values)
    # a logarithm shows no more of a narrow range, and has hardly a tick there
    narrow = {"log": 3, "": 30}.get(panel.axis, math.inf)
    if panel.axis == "codes" or (low > 0 and high > narrow * low):
        axes.set_yscale("log")
        subs = (1, 2, 5) if high < 30 * low and panel.axis != "codes" else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if panel.axis == "codes":
        axes.set_ylim(0.9, max(10, 1.5 * high))  # down to one code, which is collapse
    if panel.axis == "zero":
        axes.set_ylim(bottom=0)
    if panel.books:
        shades = np.array([line.color for line in panel.lines[: panel.books]])
        key = axes.inset_axes((1.02, 0, 0.025, 1))
        key.imshow(shades[:, None], aspect="auto", origin="lower")
        key.set_title("codebook", loc="right", fontsize=8.5)
        key.yaxis.tick_right()
        key.yaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        key.tick_params(labelsize=8, length=0)
        key.set_xticks([])
        key.spines[:].set_visible(False)
    if len(panel.lines) > max(1, panel.books):
        axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlim=(0, last_step * 1.02), xlabel="step", ylabel=panel.unit)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.tick_params(which="both", labelsize=8.5, color="#bbbbbb")
    axes.grid(color="#e8e8e8", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


def png(
    made: list[Panel], last_step: int, title: str = "", columns: int = 3, width: float = 5.2
) -> bytes:
    """The panels as one picture, each `width` inches wide; the last one fills its row."""
    count = -(-len(made) // columns)
    heights = [1.0] * count
    if len(made) % columns == 1 < columns:
        heights[-1] = 0.6  # one wide panel needs no more
    size = (width * columns, 0.66 * width * sum(heights) + 0.5 * bool(title))
    picture = figure.Figure(size, layout="constrained")
    grid = picture.add_gridspec(count, columns, height_ratios=heights)
    for i, panel in enumerate(made):
        row, column = divmod(i, columns)
        right = columns if panel is made[-1] else column + 1
        draw(picture.add_subplot(grid[row, column:right]), panel, last_step)
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=700 / width)
    return buffer.getvalue()


def summarize(rows: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """The headline figures; None where the run has none, lists with one entry a codebook.

    Accuracies and perplexities are those of the last validation, of the last logged step where
    there was none.
    """
    steps, losses = (x.ravel() for x in series(rows, "validation_loss"))
    finite = [i for i in range(len(losses)) if not math.isnan(losses[i])]
    best = min(finite, key=lambda i: losses[i], default=None)
    point = lambda i: (int(steps[i]), float(losses[i]))
    prefix = "validation_" if len(steps) else ""
    row = next(row for row in reversed(rows) if f"{prefix}loss" in row or not prefix)
    seconds = series(rows, SPEED)[1]
    clip = config.get("data", {}).get("num_samples")
    clips = config.get("batch_size")
    hours = rows[-1]["step"] * clips * clip / SAMPLE_RATE / 3600 if clip and clips else None
    return {
        "step": rows[-1]["step"],
        "total_steps": config.get("total_steps"),
        "hours": hours,
        "speed": float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else None,
        "loss": rows[-1].get("loss"),
        "first": point(finite[0]) if finite else None,
        "best": point(best) if finite else None,
        "last": point(-1) if len(steps) else None,
        "kind": "validation" if prefix else "training",
        "kind_step": row["step"],
        **{name: series([row], prefix + name)[1].ravel().tolist() for name in PER_BOOK},
    }


def warnings(rows: list[dict[str, Any]], s: dict[str, Any]) -> list[str]:
    """What is wrong with the run, a sentence each."""
    said = []
    books = lambda wrong: ", ".join(str(k) for k, is_wrong in enumerate(wrong) if is_wrong)
    used, predicted = s["code_perplexity"], s["prediction_perplexity"]
    if k := books(x < 2 for x in used):
        said.append(f"Collapsed teacher: fewer than 2 codes are in use in codebook {k}.")
    if k := books(p < max(1.5, 0.02 * x) for p, x in zip(predicted, used, strict=False)):
        said.append(f"Collapsed student: it predicts hardly more than one code in codebook {k}.")
    pairs = zip(s["masked_accuracy"], s["majority_accuracy"], strict=False)
    if k := books(x <= guess for x, guess in pairs):
        said.append(
            f"The {s['kind']} accuracy is no better than always guessing the most frequent code in "
            f"codebook {k}."
        )
    for name in ("loss", "grad_norm", "validation_loss"):
        steps, values = series(rows, name)
        if missing := np.isnan(values).any(-1).sum():
            said.append(f"{name} is not finite in {missing} of {len(steps)} rows.")
    return said


def headline(s: dict[str, Any]) -> list[tuple[str, str]]:
    """The headline figures in words: (what, how much)."""
    at = lambda point: f"{point[1]:.4g} at step {point[0]:,}" if point else "none"
    number = lambda x, form: format(x, form) if isinstance(x, int | float) else "unknown"
    return [
        ("steps", f"{s['step']:,} of {number(s['total_steps'], ',')}"),
        ("audio seen", f"{number(s['hours'], ',.1f')} h"),
        ("median speed", f"{number(s['speed'], ',.0f')} s of audio a second"),
        ("last training loss", number(s["loss"], ".4g")),
        ("first validation loss", at(s["first"])),
        ("best validation loss", at(s["best"])),
        ("last validation loss", at(s["last"])),
        (f"{s['kind']} masked accuracy", f"{metrics.mean(s['masked_accuracy']):.4f}"),
        ("always the most frequent code", f"{metrics.mean(s['majority_accuracy']):.4f}"),
    ]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
 max-width: 1300px; padding: 1rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.warning {{ background: #fff3e6; border-left: 4px solid #d55e00; padding: .5rem .8rem; }}
.tiles {{ display: grid; gap: .6rem;
 grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }}
.tiles div {{ background: #f4f6f8; border-radius: 6px; padding: .5rem .8rem; }}
.tiles span {{ display: block; color: #555; font-size: .8rem; }}
.curves {{ display: grid; gap: .6rem;
 grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }}
img {{ width: 100%; max-width: 640px; height: auto; }} .wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #e5e5e5; }}
td:first-child, th:first-child, .config td {{ text-align: left; }}
.config td {{ overflow-wrap: anywhere; }} tr:last-child.mean {{ font-weight: 600; }}
</style></head><body>
<h1>{title}</h1>
{warnings}
<div class="tiles">{tiles}</div>
<h2>Curves</h2>
<div class="curves">{curves}</div>
<h2>Codebooks, {kind}</h2>
<div class="wide"><table>{books}</table></div>
<h2>Settings</h2>
<div class="wide config"><table>{config}</table></div>
</body></html>
"""


def page(made: list[Panel], s: dict[str, Any], said: list[str], config: dict, title: str) -> str:
    """The report as one HTML file, pictures included."""
    cells = lambda tag, values: "".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in values)
    curves = []
    for panel in made:
        data = base64.b64encode(png([panel], s["step"], columns=1, width=4.3)).decode()
        curves.append(f'<img alt="{html.escape(panel.title)}" src="data:image/png;base64,{data}">')
    columns = [s[name] for name in PER_BOOK]
    table = [f"<tr>{cells('th', ['codebook', *PER_BOOK.values()])}</tr>"]
    for k, row in enumerate(zip(*columns, strict=False)):
        table.append(f"<tr>{cells('td', [k, *(f'{x:.4g}' for x in row)])}</tr>")
    means = [f"{metrics.mean(column):.4g}" for column in columns]
    table.append(f"<tr class=mean>{cells('td', ['mean', *means])}</tr>")
    leaf = lambda x: not isinstance(x, dict)
    settings = [
        (jax.tree_util.keystr(path, simple=True, separator="."), json.dumps(value))
        for path, value in jax.tree_util.tree_leaves_with_path(config, is_leaf=leaf)
    ]
    return PAGE.format(
        title=html.escape(title),
        warnings="".join(f"<p class=warning>{html.escape(line)}</p>" for line in said),
        tiles="".join(
            f"<div><span>{html.escape(what)}</span>{html.escape(much)}</div>"
            for what, much in headline(s)
        ),
        curves="".join(curves),
        kind=html.escape(f"{s['kind']} at step {s['kind_step']:,}"),
        books="".join(table),
        config="".join(f"<tr>{cells('td', row)}</tr>" for row in settings)
        or "<tr><td>there is no config.json</td></tr>",
    )


def write(path: str, content: bytes) -> None:
    """Write a file whole or not at all; UserError where that is not possible."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(content)
        os.replace(temporary, path)
    except OSError as e:
        raise cli.UserError(f"{path} cannot be written: {e}") from e


def main(workdir: str | None) -> None:
    """Write the report of `workdir` and print where it is and what it says."""
    if not workdir:
        raise cli.UserError("--workdir=DIR is needed: the folder a run was trained in")
    rows, config = load(workdir)
    made, s = panels(rows), summarize(rows, config)
    if not made:
        raise cli.UserError(f"{workdir}/metrics.jsonl holds nothing to plot")
    said = warnings(rows, s)
    title = os.path.abspath(workdir)
    paths = [os.path.join(workdir, name) for name in ("report.png", "report.html")]
    write(paths[0], png(made, s["step"], title=f"{title}   step {s['step']:,}"))
    write(paths[1], page(made, s, said, config, title).encode())
    print(f"wrote {paths[0]} and {paths[1]}")
    for what, much in headline(s):
        print(f"{what:32}{much}")
    for line in said:
        print(f"warning: {line}")


if __name__ == "__main__":
    # here and not above: other commands have a --workdir too, and absl allows one in a process
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, as given to train.")
    cli.run(lambda: main(_WORKDIR.value))
