"""Selection of the reported head by validation, and its row of the results.

Shapes: Q choices (layers, and their weighted sum), R learning rates, S seeds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (over n - 1) and the value of each seed."""
    seeds = np.array(values, np.float64)
    std = float(seeds.std(ddof=1)) if len(seeds) > 1 else 0.0
    return {"mean": float(seeds.mean()), "std": std, "seeds": seeds.tolist()}


def select(
    valid: np.ndarray,
    names: Sequence[str],
    rates: Sequence[float],
    metrics: Sequence[str],
    test: Callable[[int, int], dict[str, list[float]]],
    final: Callable[[int, int], dict[str, list[float]]] | None = None,
) -> Row:
    """Return a row of the results from validation scores [Q, R, S] of the first metric.

    Each choice takes the learning rate with the best mean over seeds, and the row the best choice;
    of equals the first. `test` and `final` map (choice, rate) to test scores of each seed: `test`
    for every choice, `final` for slow metrics of the selected one only.
    """
    means = np.nan_to_num(valid.mean(-1), nan=-np.inf)
    rate_of = means.argmax(1)
    best = int(means.max(1).argmax())
    by_layer, chosen = [], {}
    for choice, (name, rate) in enumerate(zip(names, rate_of, strict=True)):
        scores = test(choice, int(rate))
        by_layer.append(
            {
                "layer": name,
                "learning_rate": rates[rate],
                "valid": spread(valid[choice, rate]),
                "test": spread(scores[metrics[0]]),
            }
        )
        if choice == best:
            chosen = scores | (final(choice, int(rate)) if final else {})
    return {
        "layer": names[best],
        "learning_rate": rates[rate_of[best]],
        "valid": spread(valid[best, rate_of[best]]),
        "metrics": {name: spread(values) for name, values in chosen.items()},
        "by_layer": by_layer,
    }
