"""Curves and figures of a run: `python -m mert_jax.report --workdir=DIR`.

Reads DIR/metrics.jsonl and DIR/config.json; writes DIR/report.png and DIR/report.html, one file
that opens without a network.
"""

import base64
import html
import json
import math
import os
from typing import Any

import jax
import numpy as np
from absl import flags

from mert_jax import cli, object_storage
from mert_jax import files as atomic
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.files import read_jsonl
from mert_jax.pretraining import metrics
from mert_jax.reporting.plots import SPEED, Panel, panels, png, series
from mert_jax.runtime import goodput
from mert_jax.runtime.remote_workdir import RemoteWorkdir

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, as given to train.", flag_values=FLAGS
)

PER_BOOK = {
    "masked_accuracy": "accuracy",
    "majority_accuracy": "most frequent code",
    "code_perplexity": "perplexity of targets",
    "prediction_perplexity": "of predictions",
}


def load(workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl and its config, {} where there is no config.json.

    Raises UserError when there are no rows or a file cannot be read.
    """
    if not os.path.isdir(workdir):
        raise UserError(f"--workdir={workdir} is not a directory")
    path, config_path = (os.path.join(workdir, name) for name in ("metrics.jsonl", "config.json"))
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
<p>{spent}</p>
<h2>Curves</h2>
<div class="curves">{curves}</div>
<h2>Codebooks, {kind}</h2>
<div class="wide"><table>{books}</table></div>
<h2>Settings</h2>
<div class="wide config"><table>{config}</table></div>
</body></html>
"""


def page(
    made: list[Panel],
    s: dict[str, Any],
    said: list[str],
    config: dict,
    title: str,
    spent: str = "",
) -> str:
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
        spent=html.escape(spent),
        curves="".join(curves),
        kind=html.escape(f"{s['kind']} at step {s['kind_step']:,}"),
        books="".join(table),
        config="".join(f"<tr>{cells('td', row)}</tr>" for row in settings)
        or "<tr><td>there is no config.json</td></tr>",
    )


def report(workdir: str | None) -> None:
    """Write the report of `workdir` and print where it is and what it says."""
    if not workdir:
        raise UserError("--workdir=DIR is needed: the folder a run was trained in")
    with RemoteWorkdir(workdir, writes=True) as files:
        write(files.folder, object_storage.absolute(workdir))


def write(folder: str, workdir: str) -> None:
    """Write the report of the run whose files are in `folder`, those of `workdir`."""
    rows, config = load(folder)
    made, s = panels(rows), summarize(rows, config)
    if not made:
        raise UserError(f"{workdir}/metrics.jsonl holds nothing to plot")
    said = warnings(rows, s)
    spent = goodput.summary_line(goodput.read_goodput(folder))
    written = {
        "report.png": png(made, s["step"], title=f"{workdir}   step {s['step']:,}"),
        "report.html": page(made, s, said, config, workdir, spent).encode(),
    }
    for name, content in written.items():
        path = os.path.join(folder, name)
        with atomic.atomic_write(path, replace=True) as temporary, open(temporary, "wb") as f:
            f.write(content)
    print("wrote", " and ".join(os.path.join(workdir, name) for name in written))
    for what, much in headline(s):
        print(f"{what:32}{much}")
    print(spent)
    for line in said:
        print(f"warning: {line}")


def main() -> int | None:
    """Run the command and return its exit code."""
    return report(_WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
