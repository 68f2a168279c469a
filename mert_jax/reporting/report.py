"""Writes the report of a run: a picture of its curves and an HTML page."""

import base64
import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from mert_jax import object_storage
from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.pretraining import metrics
from mert_jax.reporting import plots, summary
from mert_jax.runtime import goodput
from mert_jax.runtime.remote_workdir import RemoteWorkdir

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
    panels: Sequence[plots.Panel],
    figures: dict[str, Any],
    warnings: Sequence[str],
    config: dict[str, Any],
    title: str,
    time_spent: str = "",
) -> str:
    """Return the report as one HTML file, with its pictures as data URLs."""
    curves = []
    for panel in panels:
        data = plots.png([panel], figures["step"], columns=1, width=4.3)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        curves.append(f'<img alt="{html.escape(panel.title)}" src="{url}">')
    leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    settings = [
        _table_row([jax.tree_util.keystr(path, simple=True, separator="."), json.dumps(value)])
        for path, value in leaves
    ]
    columns = [figures[name] for name in summary.PER_CODEBOOK]
    books = [_table_row(["codebook", *summary.PER_CODEBOOK.values()], "th")]
    for k, values in enumerate(zip(*columns, strict=False)):
        books.append(_table_row([k, *(f"{x:.4g}" for x in values)]))
    means = [f"{metrics.mean(column):.4g}" for column in columns]
    books.append(_table_row(["mean", *means]).replace("<tr>", "<tr class=mean>"))
    return PAGE.format(
        title=html.escape(title),
        warnings="".join(f"<p class=warning>{html.escape(line)}</p>" for line in warnings),
        tiles="".join(
            f"<div><span>{html.escape(label)}</span>{html.escape(value)}</div>"
            for label, value in summary.headline(figures)
        ),
        spent=html.escape(time_spent),
        curves="".join(curves),
        kind=html.escape(f"{figures['kind']} at step {figures['kind_step']:,}"),
        books="".join(books),
        config="".join(settings or ["<tr><td>there is no config.json</td></tr>"]),
    )


def _table_row(values: Iterable[Any], tag: str = "td") -> str:
    cells = "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)
    return f"<tr>{cells}</tr>"


def write_report(workdir: str | None) -> None:
    """Write report.png and report.html into `workdir` and print the headline figures.

    Raises UserError if the workdir holds no metrics or cannot be written.
    """
    if not workdir:
        raise UserError("--workdir=DIR is needed: the folder a run was trained in")
    with RemoteWorkdir(workdir, writes=True) as local:
        _write_files(local.folder, object_storage.absolute(workdir))


def _write_files(folder: str, workdir: str) -> None:
    # `folder` is the local copy of a remote `workdir`, or `workdir` itself
    rows, config = summary.read_run(folder)
    panels, figures = plots.panels(rows), summary.summarize(rows, config)
    if not panels:
        raise UserError(f"{workdir}/metrics.jsonl holds nothing to plot")
    warnings = summary.list_warnings(rows, figures)
    time_spent = goodput.summary_line(goodput.read_goodput(folder))
    title = f"{workdir}   step {figures['step']:,}"
    contents = {
        "report.png": plots.png(panels, figures["step"], title=title),
        "report.html": page(panels, figures, warnings, config, workdir, time_spent).encode(),
    }
    for name, content in contents.items():
        with atomic_write(os.path.join(folder, name), replace=True) as path:
            Path(path).write_bytes(content)
    print("wrote", " and ".join(os.path.join(workdir, name) for name in contents))
    for label, value in summary.headline(figures):
        print(f"{label:32}{value}")
    print("\n".join([time_spent, *(f"warning: {line}" for line in warnings)]))
