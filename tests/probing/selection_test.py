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


def test_the_layer_is_chosen_by_the_mean_over_seeds():
    valid = [[0.9, 0.1], [0.5, 0.75], [0.625, 0.625], [np.nan, 1.0]]  # of equals, the first
    test = [20.0, 10.0, 0.0, 30.0]

    def score(split, choice):
        if split == "valid":
            return [{"score": x, "other": 0.0} for x in valid[choice]]
        return [{"score": test[choice], "other": x} for x in (1.0, 2.0)]

    row = selection.select(["0", "1", "2", "sum"], (0.1, 0.2), [1, 0, 0, 0], score)
    assert (row["layer"], row["learning_rate"]) == ("1", 0.1)
    assert row["valid"]["seeds"] == [0.5, 0.75]
    assert row["metrics"]["score"]["mean"] == 10  # layer 0 would have had 20 on the test split
    assert row["metrics"]["other"]["seeds"] == [1.0, 2.0]
    assert [entry["layer"] for entry in row["by_layer"]] == ["0", "1", "2", "sum"]
    assert row["by_layer"][0]["learning_rate"] == 0.2
    assert row["by_layer"][2]["test"]["mean"] == 0
