"""Writes the report of a run: a picture of its curves and an HTML page."""

import base64
import json
import os
import string
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from mert_jax.checkpoints import object_storage
from mert_jax.checkpoints.object_storage import WorkdirMirror
from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.pretraining import metrics
from mert_jax.reporting import plots, summary
from mert_jax.runtime import goodput


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
        data = base64.b64encode(plots.png([panel], figures["step"], columns=1, width=4.3)).decode()
        curves.append(f'<img alt="{escape(panel.title)}" src="data:image/png;base64,{data}">')
    columns = [figures[name] for name in summary.PER_CODEBOOK]
    books = [_table_row(["codebook", *summary.PER_CODEBOOK.values()], "th")]
    for k, values in enumerate(zip(*columns, strict=False)):
        books.append(_table_row([k, *(f"{x:.4g}" for x in values)]))
    means = _table_row(["mean", *(f"{metrics.mean(column):.4g}" for column in columns)])
    leaves = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    settings = [_table_row([k, json.dumps(x)]) for k, (_, x) in zip(keys, leaves, strict=True)]
    pairs = summary.headline(figures)
    tiles = [f"<div><span>{escape(label)}</span>{escape(value)}</div>" for label, value in pairs]
    template = resources.files(__package__).joinpath("page.html").read_text()
    return string.Template(template).substitute(
        title=escape(title),
        warnings="".join(f"<p class=warning>{escape(line)}</p>" for line in warnings),
        tiles="".join(tiles),
        spent=escape(time_spent),
        curves="".join(curves),
        kind=escape(f"{figures['kind']} at step {figures['kind_step']:,}"),
        books="".join([*books, means.replace("<tr>", "<tr class=mean>")]),
        config="".join(settings or ["<tr><td>config.json is missing</td></tr>"]),
    )


def _table_row(values: Iterable[Any], tag: str = "td") -> str:
    cells = "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)
    return f"<tr>{cells}</tr>"


def write_report(workdir: str | None) -> None:
    """Write report.png and report.html into `workdir` and print the headline figures."""
    if not workdir:
        raise UserError("--workdir=DIR is needed: the folder a run was trained in")
    with WorkdirMirror(workdir, writes=True) as local:
        folder, workdir = local.folder, object_storage.absolute(workdir)
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
