"""Beats: targets, decoders and F-measures."""

import mir_eval
import numpy as np
import pytest

from mert_jax.probing import beats


def test_targets_widen_a_beat():
    found = beats.targets([0.0, 4 / 75, 9.99], 12, 75.0)[:, 0]
    assert found.tolist() == [1, 0.5, 0.25, 0.5, 1, 0.5, 0.25, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("how", [0.3, "dynamic"])
def test_decoders_find_regular_beats(how):
    times = np.arange(0.1, 9.8, 0.5)  # the dynamic programme fills the ends
    activation = 0.9 * beats.targets(times, 750, 75.0)[:, 0]
    found = beats.decode(activation, 75.0, how)
    assert mir_eval.beat.f_measure(times, found) > 0.97


def test_the_dynamic_programme_bridges_a_gap_that_peaks_cannot():
    times = np.arange(0.4, 9.8, 0.5)
    activation = 0.9 * beats.targets(np.delete(times, [8, 9]), 750, 75.0)[:, 0]
    bridged = mir_eval.beat.f_measure(times, beats.decode(activation, 75.0, "dynamic"))
    assert bridged > mir_eval.beat.f_measure(times, beats.decode(activation, 75.0, 0.3))


def test_scores_are_mir_evals():
    truth = [(0.5, 1.0, 1.5, 2.0), (0.2, 0.9)]
    found = [np.array([0.53, 1.01, 1.7]), np.array([0.21])]
    made = beats.score(found, truth)
    each = [mir_eval.beat.f_measure(np.array(t), f) for t, f in zip(truth, found, strict=True)]
    assert made["f_measure"] == pytest.approx(np.mean(each))
    strict = [
        mir_eval.beat.f_measure(np.array(t), f, f_measure_threshold=0.02)
        for t, f in zip(truth, found, strict=True)
    ]
    assert made["f_measure_20ms"] == pytest.approx(np.mean(strict))
    assert made["f_measure_pooled"] == pytest.approx(2 * 3 / (4 + 6))


def test_clips_without_beats_count_where_all_are_counted():
    made = beats.score([np.array([1.0]), np.array([0.5])], [(), (0.5,)])
    assert made["f_measure"] == 1
    assert made["f_measure_pooled"] == pytest.approx(2 / 3)
    assert beats.score([np.zeros(0)], [(0.5,)])["f_measure"] == 0
