"""The results of a probe: JSON, a table and a picture of the score by layer."""

import json
import os
from typing import Any

import numpy as np
from matplotlib import figure

from mert_jax import files

# Okabe and Ito's colours, distinguishable with colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write(folder: str, results: dict[str, Any]) -> None:
    """Write results.json and layers.png to `folder`."""
    # null for the numbers that JSON cannot hold
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    target, image = (os.path.join(folder, name) for name in ("results.json", "layers.png"))
    with files.atomic_write(target, replace=True) as path, open(path, "w") as file:
        file.write(json.dumps(finite, indent=1) + "\n")
    with files.atomic_write(image, replace=True) as path:
        picture(results).savefig(path, format="png", dpi=130)


def table(results: dict[str, Any]) -> str:
    """Return the table as text: mean and deviation over seeds of each metric, and chance."""
    names = list(results["features"][0]["metrics"])
    lines = [["features", "layer", "rate", *names]]
    for row in results["features"]:
        spreads = (row["metrics"][name] for name in names)
        cells = [f"{x['mean']:.4f} +- {x['std']:.4f}" for x in spreads]
        lines.append([row["name"], row["layer"], f"{row['learning_rate']:g}", *cells])
    guess = results["chance"]
    lines.append(["chance", "", "", *(f"{guess[x]:.4f}" if x in guess else "" for x in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def picture(results: dict[str, Any]) -> figure.Figure:
    """Draw the score by layer, with hollow points for validation and filled ones for test.

    Features of one layer are drawn under their names, beside the layers.
    """
    rows = results["features"]
    layers = max(([e["layer"] for e in row["by_layer"]] for row in rows), key=len)
    several = [row for row in rows if len(row["by_layer"]) > 1]
    ticks = [*(layers if several else []), *(row["name"] for row in rows if row not in several)]
    page = figure.Figure((max(7.5, 4 + 0.42 * len(ticks)), 4.2), layout="constrained")
    axes = page.add_subplot()
    for row, colour in zip(rows, COLOURS * len(rows), strict=False):
        entries = row["by_layer"]
        names = [e["layer"] for e in entries]
        at = np.array([ticks.index(x) for x in (names if row in several else [row["name"]])])
        # the weighted sum is not a layer: its point is not joined
        joined = len(at) - (names[-1] == "sum")
        styles = ("valid", ":", "white", -0.08), ("test", "-", colour, 0.08)
        for split, dash, fill, shift in styles:
            means, errors = ([e[split][key] for e in entries] for key in ("mean", "std"))
            style = dict(color=colour, fmt="o", mfc=fill, ms=5, capsize=3, lw=1.2)
            axes.errorbar(at + shift, means, errors, label=f"{row['name']}, {split}", **style)
            axes.plot((at + shift)[:joined], means[:joined], color=colour, ls=dash, lw=1.4)
        best, ring = names.index(row["layer"]), dict(ms=13, mfc="none", mec=colour, mew=1.4)
        axes.plot(at[best] + shift, means[best], "o", **ring)
    metric = results["metrics"][0]
    if metric in results["chance"]:
        guess = results["chance"][metric]
        axes.axhline(guess, color="#444444", ls="--", lw=1.2, label="chance")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(xlim=(-0.6, len(ticks) - 0.4), ylabel=metric, axisbelow=True)
    axes.set_xlabel("layer (ringed: chosen by validation)")
    title = f"{results['task']}, mean and deviation of {results['settings']['seeds']} seeds"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e8e8e8", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, edgecolor="none", loc="center left", bbox_to_anchor=(1, 0.5))
    return page
