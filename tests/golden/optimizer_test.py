"""The learning rate and the optimiser against fairseq's, in float32 and in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mert_jax.pretraining import optimizer
from tests.golden_files import DTYPE, X64, check, max_error, names, npz, read_json, relative_error


def schedule_numbers(points: dict[int, float]) -> tuple[float, int, int]:
    """Peak, warmup and total steps: official ones, unless the points themselves say otherwise."""
    peak = max(points.values())
    warmup = max(points, key=points.get)
    ends = [k for k, rate in points.items() if k > warmup and rate == 0]
    first = min((k for k, rate in points.items() if rate > 0), default=None)
    if (
        first is not None
        and first < warmup
        and not math.isclose(points[first] / first, peak / warmup, rel_tol=1e-9)
    ):
        warmup, peak = 32_000, points[first] / first * 32_000
    return peak, warmup, min(ends, default=400_000)


@pytest.mark.parametrize("model_name", read_json("lr_schedule.json"))
def test_learning_rate(model_name):
    points = {int(k): rate for k, rate in read_json("lr_schedule.json")[model_name].items()}
    schedule = optimizer.warmup_linear_decay(*schedule_numbers(points))
    ours = [schedule(jnp.asarray(k)) for k in points]
    rtol = 1e-9 if X64 else 1e-6
    np.testing.assert_allclose(ours, list(points.values()), rtol=rtol, atol=1e-20)


@pytest.mark.skipif(not names("optimizer.npz"), reason="the folder has no optimizer.npz")
def test_optimizer(record_property):
    stored = npz("optimizer.npz")
    parameters = sorted({key.split("/")[1] for key in stored if key.startswith("grad/")})
    updates = 1 + max(int(key.split("/")[2]) for key in stored if key.startswith("grad/"))
    b1, b2, eps, decay = (float(x) for x in stored["betas_eps_wd"])
    peak, warmup, total = (float(x) for x in stored["hyper_lr_warmup_total"])
    schedule = optimizer.warmup_linear_decay(peak, warmup, total)
    official = optimizer.make(
        schedule,
        clip_norm=float(stored["clip_norm"]),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=decay,
    )
    tolerance = 1e-12 if X64 else 2e-6
    params = {name: jnp.asarray(stored[f"param/{name}/0"], DTYPE) for name in parameters}
    state, update = official.init(params), jax.jit(official.update)
    worst = 0.0
    for t in range(updates):
        grads = {name: jnp.asarray(stored[f"grad/{name}/{t}"], DTYPE) for name in parameters}
        if "lr" in stored:
            worst = max(worst, relative_error(schedule(jnp.asarray(t)), stored["lr"][t]))
        if "grad_norm_before_clip" in stored:
            norm = stored["grad_norm_before_clip"][t]
            worst = max(worst, relative_error(optax.tree.norm(grads), norm))
        change, state = update(grads, state, params)
        params = optax.apply_updates(params, change)
        for name in parameters:
            if f"param/{name}/{t + 1}" in stored:
                expected = stored[f"param/{name}/{t + 1}"]
                worst = max(worst, max_error(params[name], expected))
    check(record_property, worst, tolerance)
