"""The noise mixture against the official draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.pretraining import mixture
from tests.golden_files import check, max_error, names, npz, read_json

MIXTURE = read_json("mixture.json") if names("mixture.npz") else {}


def recorded_draws() -> mixture.Draws:
    rows, most = MIXTURE["rows"], MIXTURE["number_range"][1]

    def column(key: str) -> jax.Array:
        filled = [(list(row.get(key, [])) + [0] * most)[:most] for row in rows]
        return jnp.asarray(filled, jnp.int32)

    return mixture.Draws(
        mixed=jnp.asarray([row["mixed"] for row in rows]),
        count=jnp.asarray([row.get("n", 0) for row in rows], jnp.int32),
        starts=column("starts"),
        durations=column("durations"),
        positions=column("positions"),
    )


@pytest.mark.skipif(not MIXTURE, reason="the folder has no mixture.json and mixture.npz")
def test_mixture_of_the_recorded_draws(record_property):
    stored = npz("mixture.npz")
    wave = jnp.asarray(stored["audio_i16"].astype(np.float32) / 32768)
    ours = mixture.mix(
        wave,
        recorded_draws(),
        group=len(wave),
        max_length=MIXTURE["len_range"][1],
        volume=MIXTURE["volume"],
    )
    check(record_property, max_error(ours, stored["mixed"]), 1e-6)
    for row in MIXTURE["rows"]:
        assert row["mixed"] == (row["u"] > MIXTURE["mixture_prob"])


@pytest.mark.skipif(not MIXTURE, reason="the folder has no mixture.json and mixture.npz")
def test_our_draws_follow_the_recorded_ranges():
    batch, num_samples = npz("mixture.npz")["audio_i16"].shape
    draws = mixture.draw(
        jax.random.split(jax.random.key(0), 50_000),
        num_samples,
        batch,
        prob=1 - MIXTURE["mixture_prob"],
        count=tuple(MIXTURE["number_range"]),
        length=tuple(MIXTURE["len_range"]),
    )
    draws = mixture.Draws(*map(np.asarray, draws))
    assert abs(draws.mixed.mean() - (1 - MIXTURE["mixture_prob"])) < 4 * 0.5 / 50_000**0.5
    for row in MIXTURE["rows"]:
        if not row["mixed"]:
            continue
        for ours, key in ((draws.count, "n"), (draws.durations, "duration")):
            low, high = row[f"{key}_range"]  # torch.randint's: without `high`
            assert (ours.min(), ours.max()) == (low, high - 1)
        low, high = row["start_range"]
        assert draws.starts.min() >= low
        assert draws.starts.max() < high
        assert draws.starts.max() > 0.999 * high
        for duration, (low, high) in zip(row["durations"], row["position_ranges"], strict=True):
            assert (low, high) == (0, num_samples - duration + 1)
    last = num_samples - draws.durations
    assert (draws.positions >= 0).all()
    assert (draws.positions <= last).all()
    assert (draws.positions / last).max() > 0.999
    assert draws.positions.min() < 3
