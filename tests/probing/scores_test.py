"""Scores are those of the libraries that define them."""

import mir_eval
import numpy as np
import pytest
from sklearn import metrics

from mert_jax.errors import UserError
from mert_jax.probing import pooled, scores
from mert_jax.probing.cache import Pooled
from mert_jax.tasks.registry import get_task
from mert_jax.tasks.task import Clip


def chance(task, train, test) -> dict[str, float]:
    def table(labels):
        return Pooled(np.zeros(0), [Clip("a", label=label) for label in labels], [])

    return pooled.chance(task, {"train": table(train), "test": table(test)})


def test_accuracy_and_its_chance():
    task = get_task("GTZANGenre")
    found = np.array([0, 1, 1, 3])
    outputs = np.eye(10)[[0, 1, 2, 3]]
    assert scores.score(task, outputs, found) == {"accuracy": 0.75}
    assert chance(task, [1, 1, 0], found) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("truth", "guess", "expected"),
    [
        ("C major", "C major", 1.0),
        ("C major", "G major", 0.5),
        ("C major", "A minor", 0.3),
        ("C major", "C minor", 0.2),
        ("C major", "Db major", 0.0),
        ("Eb minor", "Gb major", 0.3),
    ],
)
def test_keys_are_scored_as_mirex_does(truth, guess, expected):
    task = get_task("GS")
    outputs = np.eye(24)[[task.labels.index(guess)]]
    found = np.array([task.labels.index(truth)])
    assert scores.score(task, outputs, found)["weighted_score"] == pytest.approx(expected)
    assert mir_eval.key.weighted_score(truth, guess) == pytest.approx(expected)


def test_tags_without_two_sides_have_no_score():
    task = get_task("MTGInstrument")
    rng = np.random.default_rng(0)
    found, outputs = np.zeros((50, 40), np.float32), rng.standard_normal((50, 40))
    found[:, :3] = rng.integers(0, 2, (50, 3))
    found[:, 3] = 1
    made = scores.score(task, outputs, found)
    each = [metrics.roc_auc_score(found[:, k], outputs[:, k]) for k in range(3)]
    assert made["roc_auc"] == pytest.approx(np.mean(each))
    each = [metrics.average_precision_score(found[:, k], outputs[:, k]) for k in range(3)]
    assert made["average_precision"] == pytest.approx(np.mean(each))
    labels = [np.flatnonzero(row) for row in found]
    guess = chance(task, labels, labels)
    assert guess["roc_auc"] == 0.5
    assert guess["average_precision"] == pytest.approx(found[:, :3].mean())
    with pytest.raises(UserError, match="no tag"):
        scores.score(task, outputs, np.zeros_like(found))


def test_values():
    task = get_task("EMO")
    found = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 5.0]])
    outputs = found + np.array([[0.5, 0.0], [0.0, 0.0], [0.0, 1.0]])
    made = scores.score(task, outputs, found)
    assert list(made) == ["r2", "r2_arousal", "r2_valence"]
    assert made["r2_arousal"] == pytest.approx(1 - 0.25 / 2)
    assert made["r2"] == pytest.approx((made["r2_arousal"] + made["r2_valence"]) / 2)
    assert chance(task, found, found)["r2"] == pytest.approx(0)


def test_labels_as_arrays():
    clips = [Clip("a", label=(0, 2)), Clip("b", label=())]
    task = get_task("MTT")._replace(labels=("x", "y", "z"))
    assert scores.targets(task, clips).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert scores.targets(get_task("GS"), [Clip("a", label=5)]).dtype == np.int32


def test_clips_of_a_group_are_averaged_and_others_stand_alone():
    clips = [Clip("a", group="x"), Clip("b"), Clip("a", group="x"), Clip("b")]
    outputs = np.arange(16.0).reshape(2, 4, 2)
    means, firsts = scores.by_group(outputs, clips)
    assert firsts == [0, 1, 3]
    assert means.shape == (2, 3, 2)
    np.testing.assert_allclose(means[0], [(outputs[0, 0] + outputs[0, 2]) / 2, *outputs[0, [1, 3]]])


def test_without_the_extra_it_says_so():
    with pytest.raises(UserError, match=r"pip install -e .\[probes\]"):
        scores.needed("mir_eval.no_such_module")


def test_without_the_program_that_a_module_asks_for_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "asks.py").write_text("raise RuntimeError('ffprobe could not be found!')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"apt-get install ffmpeg: ffprobe could not"):
        scores.needed("asks")
