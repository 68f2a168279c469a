"""Selection of the reported head by validation, and its row of the results."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (over n - 1) and the value of each seed."""
    seeds = np.array(values, np.float64)
    std = float(seeds.std(ddof=1)) if len(seeds) > 1 else 0.0
    return {"mean": float(seeds.mean()), "std": std, "seeds": seeds.tolist()}


def best(means: np.ndarray) -> np.ndarray:
    """Return the index of the largest number in the last axis, of equals the first; NaN is last."""
    return np.nan_to_num(means, nan=-np.inf).argmax(-1)


def select(
    names: Sequence[str],
    rates: Sequence[float],
    rate_of: Sequence[int],
    score: Callable[[str, int], list[dict[str, float]]],
) -> dict[str, Any]:
    """Return a row of the results: that of the choice with the best score on validation.

    `rate_of` has each choice's index in `rates`; `score` maps a split and a choice to the scores of
    each seed, the first of which is reported for every choice.
    """
    by_layer, metrics = [], []
    for choice, name in enumerate(names):
        valid, test = (
            {key: spread([row[key] for row in rows]) for key in rows[0]}
            for rows in (score("valid", choice), score("test", choice))
        )
        first = next(iter(test))
        row = {"layer": name, "learning_rate": rates[rate_of[choice]]}
        by_layer.append(row | {"valid": valid[first], "test": test[first]})
        metrics.append(test)
    chosen = int(best(np.array([row["valid"]["mean"] for row in by_layer])))
    row = {key: by_layer[chosen][key] for key in ("layer", "learning_rate", "valid")}
    return row | {"metrics": metrics[chosen], "by_layer": by_layer}
