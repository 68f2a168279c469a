"""The files and the table of a probe."""

import json

import numpy as np
import pytest
from matplotlib import image

from mert_jax.probing import results


def entry(layer: str, level: float) -> dict:
    def scores(x):
        return {"mean": x, "std": 0.01, "seeds": [x, x]}

    return {"layer": layer, "learning_rate": 1e-3, "valid": scores(level), "test": scores(level)}


def row(name: str, layers: list[str]) -> dict:
    entries = [entry(layer, 0.5 + 0.1 * i) for i, layer in enumerate(layers)]
    metrics = {"accuracy": entries[0]["test"], "extra": {"mean": float("nan"), "std": 0.0}}
    return {
        "name": name,
        "layer": layers[0],
        "learning_rate": 1e-3,
        "metrics": metrics,
        "by_layer": entries,
    }


def found(*rows: dict) -> dict:
    return {
        "task": "GTZANGenre",
        "metrics": ["accuracy"],
        "features": list(rows),
        "chance": {"accuracy": 0.1},
        "settings": {"seeds": 2},
    }


def test_json_has_no_numbers_that_json_does_not_have(tmp_path):
    made = found(row("student", ["0", "1", "sum"]))
    for _ in range(2):  # a second run replaces them
        results.write(str(tmp_path), made)
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert read["features"][0]["metrics"]["extra"]["mean"] is None
    assert read["features"][0]["by_layer"] == made["features"][0]["by_layer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.png", "results.json"]
    assert np.ptp(image.imread(tmp_path / "layers.png")) > 0.5


def test_the_table_is_in_columns():
    text = results.table(found(row("student", ["7"]), row("log_mel", ["0"])))
    lines = text.splitlines()
    assert lines[0].split() == ["features", "layer", "rate", "accuracy", "extra"]
    assert lines[1].split()[:6] == ["student", "7", "0.001", "0.5000", "+-", "0.0100"]
    assert lines[3].split() == ["chance", "0.1000"]
    assert lines[1].index("0.5000") == lines[3].index("0.1000")


@pytest.mark.parametrize(
    ("rows", "ticks"),
    [
        ([("student", ["0", "1", "sum"]), ("log_mel", ["0"])], ["0", "1", "sum", "log_mel"]),
        ([("log_mel", ["0"]), ("cqt", ["0"])], ["log_mel", "cqt"]),
        ([("student", ["3", "7"]), ("random", ["3", "7"])], ["3", "7"]),
    ],
)
def test_the_picture_has_validation_and_test_of_every_layer(rows, ticks):
    (axes,) = results.picture(found(*(row(*r) for r in rows))).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ticks
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["chance"] + [f"{name}, {s}" for name, _ in rows for s in ("valid", "test")]
    assert "validation" in axes.get_xlabel()
