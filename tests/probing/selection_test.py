"""Validation alone chooses."""

import numpy as np
import pytest

from mert_jax.probing import selection


def test_spread_is_that_of_a_sample():
    found = selection.spread([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["std"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert found["seeds"] == [1, 2, 4]
    assert selection.spread([3.0])["std"] == 0


def test_rate_and_layer_are_chosen_by_the_mean_over_seeds():
    valid = np.array(
        [
            [[0.9, 0.1], [0.55, 0.55]],  # one good seed is no good rate
            [[0.5, 0.75], [np.nan, np.nan]],
            [[0.625, 0.625], [0.2, 0.2]],  # equal to the one before: the first stays
        ]
    )
    asked = []

    def test(choice, rate):
        asked.append((choice, rate))
        return {"score": [10.0 * (2 - choice), 10.0 * (2 - choice)], "other": [1.0, 2.0]}

    def final(choice, rate):
        return {"slow": [float(choice), float(rate)]}

    row = selection.select(valid, ["0", "1", "sum"], (0.1, 0.2), ("score",), test, final)
    assert asked == [(0, 1), (1, 0), (2, 0)]
    assert (row["layer"], row["learning_rate"]) == ("1", 0.1)
    assert row["metrics"]["score"]["mean"] == 10  # layer 0 would have had 20 on the test split
    assert row["metrics"]["slow"]["seeds"] == [1.0, 0.0]
    assert [entry["layer"] for entry in row["by_layer"]] == ["0", "1", "sum"]
    assert row["by_layer"][0]["learning_rate"] == 0.2
    assert row["by_layer"][2]["test"]["mean"] == 0
