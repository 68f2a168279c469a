"""Progress on standard error: a bar with rate and time left, and notes between bars."""

import sys

from tqdm import tqdm


def bar(what: str, total: int, unit: str) -> tqdm:
    """A bar of `total` units, for use in a with statement."""
    # into a log file, a line now and then is enough
    interval = 0.2 if sys.stderr.isatty() else 10
    scale = total >= 10_000
    return tqdm(desc=what, total=total, unit=unit, unit_scale=scale, mininterval=interval)


def note(message: str) -> None:
    """One line."""
    print(message, file=sys.stderr, flush=True)
