"""Heads are trained at once as if each were alone, and each is kept as of its best epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mert_jax.probing import head, objectives

CLASSES = objectives.Objective(3, objectives.cross_entropy, objectives.correct)
QUICK = head.HeadSettings(epochs=8, batch_size=16, rates=(1e-3, 3e-2), seeds=2)


def layered(rng, n: int, layers: int = 3, width: int = 6, classes: int = 3, informative: int = 1):
    """Features [n, L, D] of which one layer knows the class, and the classes."""
    y = rng.integers(0, classes, n).astype(np.int32)
    x = rng.standard_normal((n, layers, width)).astype(np.float32)
    x[np.arange(n), informative, y] += 5
    return x, y


def data(**options):
    rng = np.random.default_rng(0)
    return layered(rng, 96, **options), layered(rng, 50, **options)


def test_the_layer_that_knows_is_found():
    train, valid = data()
    fitted = head.fit(lambda epoch: train, valid, CLASSES, QUICK)
    quality = fitted.quality.mean(0)[1]  # [Q] at the second rate
    assert quality.argmax() == 1
    assert quality[1] > 0.95
    assert quality[[0, 2]].max() < 0.6
    assert quality[3] > 0.85  # the weighted sum: it has to find the layer
    accuracy = (head.predict(fitted, valid[0], 1, 1).argmax(-1) == valid[1]).mean(-1)
    np.testing.assert_allclose(accuracy, fitted.quality[:, 1, 1], atol=2e-3)
    weights = np.asarray(fitted.params["mixed"]["mix"])[:, 1]
    assert (weights.argmax(-1) == 1).all()


@pytest.mark.parametrize("hidden", [0, 5])
def test_heads_do_not_touch_one_another(hidden):
    (x, y), (xv, yv) = data()
    both = QUICK._replace(hidden=hidden, epochs=3)
    together = head.fit(lambda epoch: (x, y), (xv, yv), CLASSES, both)
    x, xv = x.copy(), xv.copy()
    x[:, 2], xv[:, 2] = 0, 0
    alone = both._replace(rates=both.rates[1:], mixed=False)
    found = head.fit(lambda epoch: (x, y), (xv, yv), CLASSES, alone)
    np.testing.assert_allclose(
        head.predict(together, xv, 1, 1), head.predict(found, xv, 1, 0), atol=1e-4
    )
    assert not np.allclose(head.predict(together, xv, 1, 0), head.predict(found, xv, 1, 0))
    assert not np.allclose(*head.predict(found, xv, 1, 0), atol=1e-3), "both seeds are one"


def test_a_head_is_what_optax_makes_of_it():
    """The last epoch's head, by plain AdamW with a cosine schedule, in the same order."""
    (x, y), valid = data()
    settings = QUICK._replace(rates=(3e-3,), seeds=1, mixed=False, epochs=2)
    # a quality that rises with every epoch keeps the last one
    objective = CLASSES._replace(quality=_epochs_up())
    fitted = head.fit(lambda epoch: (x, y), valid, objective, settings)
    mean, std = head.mean_and_std(x)
    z = ((x - mean) / std)[:, 1]
    (key,), params, _ = head._start(3, 6, 3, settings)
    params = jax.tree.map(lambda a: a[0, 0, 1], params["single"])
    steps = 96 // 16
    schedule = optax.cosine_decay_schedule(3e-3, 2 * steps)
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    moments = optimizer.init(params)
    for epoch in range(2):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), 96)
        for index in order.reshape(steps, 16):

            def loss(p, i=index):
                return objectives.cross_entropy(head.one(p, z[i]), y[i]).mean()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            params = optax.apply_updates(params, updates)
    kept = jax.tree.map(lambda a: a[0, 0, 1], fitted.params["single"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, params)


def _epochs_up():
    """The size of the weights shows in the logits: it grows while little has been learnt."""
    return lambda logits, target: jnp.square(logits).mean(-1)


def test_each_head_is_kept_as_of_its_best_epoch():
    train, valid = data()
    rough = QUICK._replace(rates=(1e-3, 3.0), epochs=6)
    fitted = head.fit(lambda epoch: train, valid, CLASSES, rough)
    logits = head.predict(fitted, valid[0], 1, 0)
    quality = [np.asarray(objectives.correct(jnp.asarray(x), valid[1])).mean() for x in logits]
    np.testing.assert_allclose(quality, fitted.quality[:, 0, 1], atol=1e-4)


def test_rates_that_diverge_do_not_win():
    train, valid = data()
    objective = objectives.Objective(
        3,
        loss=lambda logits, y: objectives.cross_entropy(logits, y) * jnp.float32(1e30),
        quality=lambda logits, y: -objectives.cross_entropy(logits, y),
    )
    rough = QUICK._replace(rates=(1e30,), epochs=2)
    fitted = head.fit(lambda epoch: train, valid, objective, rough)
    assert not np.isnan(fitted.quality).any()


def test_values_and_tags_are_learnt():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((400, 1, 5)).astype(np.float32)
    line = x[:, 0] @ rng.standard_normal((5, 2)).astype(np.float32)
    settings = QUICK._replace(mixed=False, epochs=20)
    found = head.fit(
        lambda e: (x[:300], line[:300]),
        (x[300:], line[300:]),
        objectives.Objective(2, objectives.squares),
        settings,
    )
    error = np.square(head.predict(found, x[300:], 0, 1) - line[None, 300:]).mean()
    assert error < 0.05 * line.var()
    tags = (line > 0).astype(np.float32)
    found = head.fit(
        lambda e: (x[:300], tags[:300]),
        (x[300:], tags[300:]),
        objectives.Objective(2, objectives.binary),
        settings,
    )
    right = (head.predict(found, x[300:], 0, 1) > 0) == tags[None, 300:].astype(bool)
    assert right.mean() > 0.93


def test_validation_of_any_size_counts_each_clip_once(monkeypatch):
    train, valid = data()
    whole = head.fit(lambda epoch: train, valid, CLASSES, QUICK._replace(epochs=2))
    monkeypatch.setattr(head, "CHUNK", 16)  # 50 clips: four chunks, the last one of two
    parts = head.fit(lambda epoch: train, valid, CLASSES, QUICK._replace(epochs=2))
    np.testing.assert_allclose(whole.quality, parts.quality, atol=1e-5)
    x = valid[0][:21]
    np.testing.assert_allclose(
        head.predict(parts, x, 3, 0), head.predict(whole, x, 3, 0), atol=1e-5
    )


def test_statistics_are_those_of_training_and_constants_are_left_alone():
    x = np.random.default_rng(0).standard_normal((30, 2, 4)).astype(np.float32) * 3 + 1
    x[:, 1, 2] = 1e4
    mean, std = head.mean_and_std(x)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-4)
    assert std[1, 2] == 1
    np.testing.assert_allclose(std[0], x[:, 0].std(0), rtol=1e-4)
