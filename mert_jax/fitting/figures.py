"""Quality of codebooks on frames: perplexity, error and dead codes, as a table and a picture.

Shapes: n frames, K codebooks, V codes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib import colormaps, figure

from mert_jax.data.code_checks import perplexity
from mert_jax.reporting.plots import BASELINE, TRAIN, VALIDATION

CHUNK = 4096  # frames encoded at a time


class Book(NamedTuple):
    """One codebook on one split: perplexity of its codes, fraction of the variance left after it,
    number of codes never used, and the count of each code, most frequent first."""

    name: str
    size: int
    perplexity: float
    error: float
    dead: int
    counts: list[int]


def encode(function: Callable[[Any], Any], x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and squared errors [n, K] of arrays [n, F]; `function` encodes one row."""
    by_chunks = jax.jit(lambda x: jax.lax.map(function, x, batch_size=CHUNK))
    return jax.tree.map(np.asarray, by_chunks(x))


def variance(x: np.ndarray) -> float:
    """Return the mean squared distance of the rows of `x` [n, d] to their mean."""
    return float(x.var(0, dtype=np.float64).sum())


def measure(
    codes: np.ndarray,
    squares: np.ndarray,
    names: Sequence[str],
    sizes: Sequence[int],
    variances: Sequence[float],
) -> list[Book]:
    """Return the figures of each codebook from codes and squared errors [n, K]."""
    books = []
    for k, (name, size, total) in enumerate(zip(names, sizes, variances, strict=True)):
        counts = np.sort(np.bincount(codes[:, k], minlength=size))[::-1]
        error = float(squares[:, k].mean(dtype=np.float64) / max(total, 1e-12))
        dead = int((counts == 0).sum())
        books.append(Book(name, size, float(perplexity(counts)), error, dead, counts.tolist()))
    return books


def table(figures: Mapping[str, list[Book]]) -> str:
    """Return a line for each codebook, with the splits side by side."""
    splits = "".join(f"  {split:>34}" for split in figures)
    columns = f"  {'perplexity':>12}{'variance left':>15}{'dead':>7}" * len(figures)
    lines = [" " * 22 + splits, f"{'codebook':<16}{'size':>6}{columns}"]
    for rows in zip(*figures.values(), strict=True):
        cells = "".join(f"  {b.perplexity:>12.1f}{b.error:>14.1%} {b.dead:>7}" for b in rows)
        lines.append(f"{rows[0].name:<16}{rows[0].size:>6}{cells}")
    return "\n".join(lines)


def png(figures: Mapping[str, list[Book]], title: str) -> bytes:
    """Draw variance left and perplexity by codebook, and the share of each code in training."""
    picture = figure.Figure((15, 4.4), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    train = figures["train"]
    ticks, width = np.arange(len(train)), 0.8 / len(figures)
    colors = {"train": TRAIN, "validation": VALIDATION}
    for i, (split, books) in enumerate(figures.items()):
        style = dict(width=width, label=split, color=colors[split])
        positions = ticks + (i - (len(figures) - 1) / 2) * width
        left.bar(positions, [book.error for book in books], **style)
        middle.bar(positions, [book.perplexity for book in books], **style)
    sizes = [book.size for book in train]
    middle.scatter(ticks, sizes, marker="_", s=400, color=BASELINE, label="codes")
    for axes in (left, middle):
        axes.set_xticks(ticks, [b.name for b in train], rotation=30 if len(train) > 3 else 0)
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=8.5, framealpha=0.7, edgecolor="none", loc="upper right", ncols=3)
    right.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(train))))
    for book in train:
        shares = np.array(book.counts) / sum(book.counts)
        right.plot(np.arange(1, book.size + 1), shares, lw=1.3, label=book.name)
    right.set(yscale="log", xlabel="code, most frequent first")
    right.legend(fontsize=8.5, framealpha=0.7, edgecolor="none")
    titles = ("Variance left", "Perplexity of the codes", "Share of the train frames")
    for axes, text in zip((left, middle, right), titles, strict=True):
        axes.set_title(text, loc="left", fontsize=11, fontweight="bold")
        axes.grid(color="#e8e8e8", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
