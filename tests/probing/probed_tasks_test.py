"""Each task from audio to results, on a tiny set in its official layout."""

import json

import pytest

from mert_jax.probing import sampling
from mert_jax.probing.run import probe, summary
from mert_jax.tasks.registry import TABLE, get_task
from tests.labelled_music import WRITERS, with_ffmpeg
from tests.probing.probe_test import QUICK, some_layers

# what has to be exceeded where the best there is would be 1, for "sdr" dB
LEAST = {"EMO": 0.4, "GTZANBeatTracking": 0.8, "MUSDB18": 5.0}
# whose reader and kind are another's: each set has its own programs to compile
TWINS = ("MTGGenre", "MTGInstrument", "MTGMood", "NSynthI", "VocalSetS")
MARKS = dict.fromkeys(TWINS, pytest.mark.slow) | {"MUSDB18": with_ffmpeg}


# those of make_tasks are in make_tasks_test.py
OFFICIAL = sorted(name for name in TABLE if not name.startswith("made_"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, ())) for name in OFFICIAL],
)
def test_each_task_is_learnt_from_its_official_layout(tmp_path, name, monkeypatch):
    monkeypatch.setattr(sampling, "TRAIN", 1024)
    monkeypatch.setattr(sampling, "VALID", 256)
    task = get_task(name)
    data = WRITERS[name](tmp_path / "data")
    found = probe(task, data, str(tmp_path / "out"), [some_layers()], QUICK)
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    assert read["task"] == name
    (row,) = read["features"]
    assert set(task.metrics) <= set(row["metrics"])
    assert read["metrics"] == list(task.metrics)
    for score in row["metrics"].values():
        assert len(score["seeds"]) == 2
    mean = row["metrics"][task.metrics[0]]["mean"]
    assert mean > LEAST.get(name, 0.9), summary(found, "out")
    assert mean > read["chance"][task.metrics[0]] + 0.2
    assert [entry["layer"] for entry in row["by_layer"]] == ["0", "1", "2", "sum"]
    assert row["layer"] in ("1", "sum")
    valid = [entry["valid"]["mean"] for entry in row["by_layer"]]
    assert max(valid) == row["valid"]["mean"]
    assert row["head"] == "linear"
    assert read["left_out"] == []
    assert (tmp_path / "out" / "layers.png").stat().st_size > 1000
