"""The results of a probe: JSON, a table and a picture of the score by layer."""

import json
import os
from typing import Any

from matplotlib import figure

from mert_jax import files
from mert_jax.files import finite_or_none

# Okabe and Ito's colours, distinguishable with colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write(folder: str, results: dict[str, Any]) -> None:
    """Write results.json and layers.png to `folder`."""
    text = json.dumps(_finite(results), indent=1) + "\n"
    target = os.path.join(folder, "results.json")
    with files.atomic_write(target, replace=True) as path, open(path, "w") as file:
        file.write(text)
    with files.atomic_write(os.path.join(folder, "layers.png"), replace=True) as path:
        picture(results).savefig(path, format="png", dpi=130)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, list | tuple) else finite_or_none(value)


def table(results: dict[str, Any]) -> str:
    """Return the table as text: mean and deviation over seeds of each metric, and chance."""
    names = list(results["features"][0]["metrics"])
    lines = [["features", "layer", "rate", *names]]
    for row in results["features"]:
        cells = [row["name"], row["layer"], f"{row['learning_rate']:g}"]
        spreads = (row["metrics"][name] for name in names)
        lines.append([*cells, *(f"{x['mean']:.4f} +- {x['std']:.4f}" for x in spreads)])
    guess = results["chance"]
    lines.append(["chance", "", "", *(f"{guess[x]:.4f}" if x in guess else "" for x in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in lines]
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
        at = [ticks.index(e["layer"] if row in several else row["name"]) for e in entries]
        # the weighted sum is not a layer: its point is not joined
        joined = len(at) - (entries[-1]["layer"] == "sum")
        for split, dash, fill in (("valid", ":", "white"), ("test", "-", colour)):
            means, errors = ([e[split][key] for e in entries] for key in ("mean", "std"))
            style = dict(color=colour, fmt="o", mfc=fill, ms=5, capsize=3, lw=1.2)
            shift = 0.08 if split == "test" else -0.08
            moved = [x + shift for x in at]
            axes.errorbar(moved, means, errors, label=f"{row['name']}, {split}", **style)
            axes.plot(moved[:joined], means[:joined], color=colour, ls=dash, lw=1.4)
            if split == "test":
                best = [e["layer"] for e in entries].index(row["layer"])
                ring = dict(ms=13, mfc="none", mec=colour, mew=1.4)
                axes.plot(moved[best], means[best], "o", **ring)
    if (guess := results["chance"].get(results["metrics"][0])) is not None:
        axes.axhline(guess, color="#444444", ls="--", lw=1.2, label="chance")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    axes.set(xlabel="layer (ringed: chosen by validation)", ylabel=results["metrics"][0])
    title = f"{results['task']}, mean and deviation of {results['settings']['seeds']} seeds"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e8e8e8", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, edgecolor="none", loc="center left", bbox_to_anchor=(1, 0.5))
    return page
