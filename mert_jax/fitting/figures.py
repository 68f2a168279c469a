"""How well codebooks describe frames: perplexity, error and dead codes, as text and a picture.

Shapes: n frames, K codebooks, V codes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

CHUNK = 4096  # frames encoded at a time


class Book(NamedTuple):
    """One codebook on one split: perplexity of its codes, share of variance left after it, codes
    never used, and how often each code came, most frequent first."""

    name: str
    size: int
    perplexity: float
    error: float
    dead: int
    counts: list[int]


def encode(function: Callable[[Any], Any], x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes and squares [n, K] of `function`, given the arrays [n, F] of `x` a chunk at a time."""
    compiled, parts = jax.jit(function), []
    frames = len(jax.tree.leaves(x)[0])
    for start in range(0, frames, CHUNK):
        parts.append(jax.tree.map(np.asarray, compiled(_chunk(x, start))))
    codes, squares = (np.concatenate(each)[:frames] for each in zip(*parts, strict=True))
    return codes, squares


def _chunk(x: Any, start: int) -> Any:
    def cut(array: np.ndarray) -> np.ndarray:
        part = array[start : start + CHUNK]
        # one shape to compile for
        return np.pad(part, [(0, CHUNK - len(part)), *[(0, 0)] * (array.ndim - 1)])

    return jax.tree.map(cut, x)


def variance(x: np.ndarray) -> float:
    """Mean squared distance of the rows of `x` [n, d] to their mean."""
    return float(x.var(0, dtype=np.float64).sum())


def measure(
    codes: np.ndarray,
    squares: np.ndarray,
    *,
    names: Sequence[str],
    sizes: Sequence[int],
    variances: Sequence[float],
) -> list[Book]:
    """The figures of each book from codes and squared errors [n, K]."""
    books = []
    for k, (name, size, total) in enumerate(zip(names, sizes, variances, strict=True)):
        counts = np.sort(np.bincount(codes[:, k], minlength=size))[::-1]
        shares = counts[counts > 0] / counts.sum()
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        error = float(squares[:, k].mean(dtype=np.float64) / max(total, 1e-12))
        dead = int((counts == 0).sum())
        books.append(Book(name, size, perplexity, error, dead, counts.tolist()))
    return books


def text(figures: Mapping[str, list[Book]]) -> str:
    """A line for each book, with the splits side by side."""
    splits = "".join(f"  {split:>34}" for split in figures)
    lines = [" " * 22 + splits]
    columns = f"  {'perplexity':>12}{'variance left':>15}{'dead':>7}" * len(figures)
    lines.append(f"{'codebook':<16}{'size':>6}{columns}")
    for rows in zip(*figures.values(), strict=True):
        cells = "".join(f"  {b.perplexity:>12.1f}{b.error:>14.1%} {b.dead:>7}" for b in rows)
        lines.append(f"{rows[0].name:<16}{rows[0].size:>6}{cells}")
    return "\n".join(lines)


def png(figures: Mapping[str, list[Book]], title: str) -> bytes:
    """Variance left and perplexity by codebook, and how evenly the train split uses the codes."""
    from matplotlib import colormaps, figure

    from mert_jax.reporting.plots import TRAIN, VALIDATION

    picture = figure.Figure((15, 4.4), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    names = [book.name for book in figures["train"]]
    width = 0.8 / len(figures)
    colors = {"train": TRAIN, "validation": VALIDATION}
    for i, (split, books) in enumerate(figures.items()):
        at = np.arange(len(books)) + (i - (len(figures) - 1) / 2) * width
        left.bar(at, [b.error for b in books], width, label=split, color=colors[split])
        middle.bar(at, [b.perplexity for b in books], width, label=split, color=colors[split])
    sizes = [b.size for b in figures["train"]]
    middle.scatter(range(len(names)), sizes, marker="_", s=400, color="#444444", label="codes")
    for axes in (left, middle):
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0)
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=8.5, framealpha=0.7, edgecolor="none", loc="upper right", ncols=3)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for book, shade in zip(figures["train"], shades, strict=True):
        shares = np.array(book.counts) / sum(book.counts)
        right.plot(np.arange(1, book.size + 1), shares, color=shade, lw=1.3, label=book.name)
    right.set_yscale("log")
    right.legend(fontsize=8.5, framealpha=0.7, edgecolor="none")
    right.set_xlabel("code, most frequent first")
    for axes, name in zip(
        (left, middle, right),
        ("Variance left", "Perplexity of the codes", "Share of the train frames"),
        strict=True,
    ):
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes.grid(color="#e8e8e8", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle(title, x=0.01, ha="left", fontsize=13, parse_math=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
