"""Progress on standard error: a bar with rate and time left, and notes between bars."""

import sys

from tqdm import tqdm


def bar(description: str, total: int, unit: str) -> tqdm:
    """Return a bar of `total` units, for use in a with statement."""
    interval = 0.2 if sys.stderr.isatty() else 10  # a log file needs fewer lines than a terminal
    options = dict(unit_scale=unit in ("B", "s") or total >= 10_000, mininterval=interval)
    return tqdm(desc=description, total=total, unit=unit, smoothing=0.05, **options)


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
