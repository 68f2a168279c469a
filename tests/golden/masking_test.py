"""Statistics of span masks against fairseq's."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.pretraining import masking
from tests.golden_files import (
    read_json,
)

MASKS = read_json("mask_stats.json")
ROWS = 20_000


def mask_settings() -> dict[str, float]:
    text = MASKS.get("settings", "")
    found = {
        name: re.search(rf"{name} ([\d.]+)", text)
        for name in ("mask_prob", "mask_length", "min_masks")
    }
    default = dict(mask_prob=0.8, mask_length=5, min_masks=2)
    return {
        name: type(default[name])(float(match[1])) if match else default[name]
        for name, match in found.items()
    }


@functools.cache
def untrimmed_masks(frames: int) -> jax.Array:
    row_keys = jax.random.split(jax.random.key(frames), ROWS + ROWS // 100)
    make = functools.partial(masking.span_mask, length=frames, group=1, **mask_settings())
    return jax.jit(make)(row_keys, jnp.full(row_keys.shape, frames))


def masks(frames: int, group: int) -> np.ndarray:
    """At least 20,000 masks of our own, bool [rows, T], trimmed within groups."""
    mask = untrimmed_masks(frames)
    mask = mask[: len(mask) // group * group]
    if group == 1:
        return np.asarray(mask)
    # what span_mask itself does last, so that the spans need not be drawn for each group again
    row_keys = jax.random.split(jax.random.key(group), len(mask))
    return np.asarray(
        jax.jit(masking.trim_to_equal_counts, static_argnums=2)(row_keys, mask, group)
    )


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs of masked frames: how many each row has, and all their lengths."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return (edges == 1).sum(1), ends[1] - starts[1]


def exact_masking(frames: int) -> np.ndarray:
    """The probability that each frame is masked, before trimming: [T]."""
    settings = mask_settings()
    length = settings["mask_length"]
    count = settings["mask_prob"] * frames / length
    choices = frames - length
    # frame t is hidden by the starts from t - length + 1 to t that are allowed
    t = np.arange(frames)
    covering = np.minimum(t, choices - 1) - np.maximum(t - length + 1, 0) + 1
    probability = np.zeros(frames)
    for n, weight in (
        (math.floor(count), 1 - count % 1),
        (math.floor(count) + 1, count % 1),
    ):
        n = max(n, settings["min_masks"])
        missed = [math.comb(choices - c, n) / math.comb(choices, n) for c in map(int, covering)]
        probability += weight * (1 - np.array(missed))
    return probability


def within_4_standard_errors(ours, stored, spread, ours_n, stored_n) -> None:
    error = spread * (1 / ours_n + 1 / stored_n) ** 0.5
    assert abs(ours - stored) <= 4 * error + 1e-12, f"{ours} and {stored} differ by > 4 x {error}"


MASK_CASES = [
    (frames, key)
    for frames in MASKS
    if re.fullmatch(r"T\d+", frames)
    for key in MASKS[frames]
    if "trimmed_batch" in key
]


@pytest.mark.parametrize(("frames", "key"), MASK_CASES)
def test_mask_statistics(frames, key):
    stored, length = MASKS[frames][key], int(frames[1:])
    group = int(re.search(r"\d+$", key)[0])
    mask = masks(length, group)
    num_runs, run_lengths = runs(mask)
    counts = mask.sum(1)
    # rows of a group are not independent: groups are
    ours_n, stored_n = len(mask) // group, stored["rows"] // group
    by_group = mask.mean(1).reshape(-1, group).mean(1)
    compare = functools.partial(within_4_standard_errors, ours_n=ours_n, stored_n=stored_n)

    # The recorded statistics of runs scatter three times as widely as those of 20,000 rows do, as
    # if from a tenth of the rows; masking_test.py compares ours with an independent generator's.
    compare_runs = functools.partial(compare, stored_n=stored_n / 10)

    assert len(mask) >= ROWS
    if stored.get("every_row_same_count"):
        assert (counts.reshape(-1, group) == counts.reshape(-1, group)[:, :1]).all()
    if "mean_fraction" in stored:
        compare(mask.mean(), stored["mean_fraction"], by_group.std())
    if "mean_count" in stored:
        compare(counts.mean(), stored["mean_count"], by_group.std() * length)
    if "std_fraction" in stored:
        compare(mask.mean(1).std(), stored["std_fraction"], by_group.std() / 2**0.5)
    if "std_count" in stored:
        compare(counts.std(), stored["std_count"], by_group.std() * length / 2**0.5)
    if "contiguous_runs" in stored:
        spread = num_runs.reshape(-1, group).mean(1).std()
        compare(num_runs.mean(), stored["contiguous_runs"]["mean"], spread)
        # the spread over rows has both a group's and a row's share
        relative = ((num_runs.reshape(-1, group) - num_runs.mean()) ** 2).mean(1).std()
        compare(num_runs.var(), stored["contiguous_runs"]["std"] ** 2, relative)
        for extreme in {"min", "max"} & set(stored["contiguous_runs"]):
            value = getattr(num_runs, extreme)()
            assert abs(value - stored["contiguous_runs"][extreme]) <= 2 * num_runs.std()
    if "fraction_of_runs_shorter_than_5" in stored:
        short = run_lengths < 5
        per_row = np.repeat(np.arange(len(mask)), num_runs) // group
        per_group = np.bincount(per_row, short) / np.bincount(per_row)
        compare_runs(short.mean(), stored["fraction_of_runs_shorter_than_5"], per_group.std())
    for extreme in {"min", "max"} & set(stored):
        value = getattr(mask.mean(1), extreme)()
        assert abs(value - stored[extreme]) <= 2 * mask.mean(1).std()
    if "run_length" in stored:
        lengths = stored["run_length"]
        spread = np.bincount(np.repeat(np.arange(len(mask)), num_runs), run_lengths) / num_runs
        compare_runs(run_lengths.mean(), lengths["mean"], spread.std())
        assert run_lengths.min() == lengths["min"]
        assert np.median(run_lengths) == lengths["median"]
        assert np.percentile(run_lengths, 95) == lengths["p95"]
        # the tail is exponential: the largest of n grows by a scale for each factor of e in n and
        # strays by 1.28 scales
        scale = (lengths["p95"] - lengths["min"]) / math.log(20)
        expected = lengths["max"] + scale * math.log(10)
        assert abs(run_lengths.max() - expected) <= 4 * 1.28 * 2**0.5 * scale
    for key, ours in (
        ("p_masked_first_frames", mask.mean(0)[:6]),
        ("p_masked_last_frames", mask.mean(0)[-6:]),
    ):
        for p, q in zip(ours, stored.get(key, []), strict=False):
            compare(p, q, (q * (1 - q)) ** 0.5)
    if "p_masked_last_frames" in stored:
        assert not mask[:, -1].any()
    if "p_masked_middle" in stored:
        # frames of a row lean against each other; the row's own mean bounds how much
        inner = mask[:, 10:-10].mean(1)
        compare(inner.mean(), stored["p_masked_middle"], inner.std())


@pytest.mark.parametrize("frames", [key for key in MASKS if re.fullmatch(r"T\d+", key)])
def test_masks_against_exact_means(frames):
    length, exact = int(frames[1:]), exact_masking(int(frames[1:]))
    mask = masks(length, 1)
    by_row = mask.mean(1)
    error = by_row.std() / len(mask) ** 0.5
    assert abs(by_row.mean() - exact.mean()) <= 4 * error
    errors = np.sqrt(exact * (1 - exact) / len(mask))
    # 4 standard errors of each frame, allowing for having looked at all of them
    assert (np.abs(mask.mean(0) - exact) <= 5 * errors).all()
    assert exact[-1] == 0
    assert not mask[:, -1].any()
    if "theory_middle_frame" in MASKS[frames]:
        theory = MASKS[frames]["theory_middle_frame"]
        np.testing.assert_allclose(exact[length // 2], theory, rtol=1e-3)
