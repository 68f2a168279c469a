"""Heads on frozen features: one for each layer, learning rate and seed, all trained at once.

Shapes: S seeds, R learning rates, L layers, Q choices (each layer, and their weighted sum), N clips
or frames, B of a minibatch, D width, C outputs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mert_jax.probing.objectives import Objective

Array = jax.Array
CHUNK = 1024  # rows of a batch in evaluation
# In standard deviations: a feature that was nearly constant in training must not dominate later
FARTHEST = 10.0
START = 0.1  # scale of the first weights, small so that untrained ones do not decide


class HeadSettings(NamedTuple):
    """Settings of the training of heads.

    hidden: width of the hidden layer, 0 for none
    rates: learning rates to try
    single, mixed: train a head for each layer, and one for the weighted sum of all
    """

    hidden: int = 0
    epochs: int = 50
    batch_size: int = 64
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 3
    weight_decay: float = 1e-2
    single: bool = True
    mixed: bool = True


class Fitted(NamedTuple):
    """Heads, each of its best epoch.

    mean, std: statistics that standardise the features, [L, D]
    quality, epochs: quality on validation and best epoch, [S, R, Q]
    """

    params: Any
    mean: np.ndarray
    std: np.ndarray
    quality: np.ndarray
    epochs: np.ndarray


def _layer(
    key: Array, inputs: int, outputs: int, shape: tuple[int, ...], scale: float = START
) -> dict[str, Array]:
    weights = jax.random.normal(key, (*shape, inputs, outputs)) * (scale / np.sqrt(inputs))
    return {"weights": weights, "bias": jnp.zeros((*shape, outputs))}


def _init(key: Array, layers: int, width: int, outputs: int, settings: HeadSettings) -> Any:
    """Return the heads of one seed, the same for all learning rates."""

    def heads(key: Array, shape: tuple[int, ...]) -> dict[str, Any]:
        if not settings.hidden:
            return {"last": _layer(key, width, outputs, shape)}
        first, last = jax.random.split(key)
        return {
            "first": _layer(first, width, settings.hidden, shape, 2**0.5),
            "last": _layer(last, settings.hidden, outputs, shape),
        }

    single, mixed = jax.random.split(key)
    params = {}
    if settings.single:
        params["single"] = heads(single, (layers,))
    if settings.mixed:
        params["mixed"] = heads(mixed, ()) | {"mix": jnp.zeros(layers)}
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x[None], (len(settings.rates), *x.shape)), params
    )


@functools.partial(jax.jit, static_argnames=("layers", "width", "outputs", "settings"))
def _start(layers: int, width: int, outputs: int, settings: HeadSettings) -> tuple[Array, Any, Any]:
    """Return the keys of the seeds [S], their heads, and the optimizer's state."""
    keys = jax.vmap(jax.random.key)(jnp.arange(settings.seeds))
    params = jax.vmap(lambda key: _init(key, layers, width, outputs, settings))(keys)
    return keys, params, _optimizer(settings).init(params)


def _affine(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["weights"] + layer["bias"][None]


def one(head: dict[str, Any], x: Array) -> Array:
    """Return the logits [N, C] of one head for x [N, D], or [N, L, D] if it weighs layers."""
    if "mix" in head:
        x = jnp.einsum("l,nld->nd", jax.nn.softmax(head["mix"]), x)
    if "first" in head:
        x = jax.nn.relu(_affine(head["first"], x))
    return _affine(head["last"], x)


def _all(params: Any, x: Array) -> Array:
    """Return the logits [R, Q, N, C] of all heads of one seed for x [N, L, D]."""
    logits = []
    if "single" in params:
        each_layer = jax.vmap(one, (0, 1))
        logits.append(jax.vmap(each_layer, (0, None))(params["single"], x))
    if "mixed" in params:
        logits.append(jax.vmap(one, (0, None))(params["mixed"], x)[:, None])
    return jnp.concatenate(logits, 1)


def _standardise(x: Array, mean: Array, std: Array) -> Array:
    leading = (None,) * (x.ndim - mean.ndim)
    z = (x.astype(jnp.float32) - mean[leading]) / std[leading]
    return jnp.clip(z, -FARTHEST, FARTHEST)


def _mean_of(function: Callable, logits: Array, target: Any) -> Array:
    """Return the mean of `function` over N, for logits [R, Q, N, C]: [R, Q]."""
    return jax.vmap(jax.vmap(lambda x: function(x, target).mean()))(logits)


def _optimizer(settings: HeadSettings) -> optax.GradientTransformation:
    """Return AdamW without its learning rate, which differs between heads."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay))


@functools.partial(jax.jit, static_argnames=("objective", "settings", "size"))
def _epoch(state, keys, x, y, statistics, epoch, *, objective, settings, size):
    """Train one epoch on x [N, L, D] in minibatches of `size`, each seed in its own order."""
    steps = len(x) // size
    turn = jax.vmap(lambda k: jax.random.fold_in(k, epoch))(keys)
    order = jax.vmap(lambda k: jax.random.permutation(k, len(x)))(turn)
    order = order[:, : steps * size].reshape(-1, steps, size).swapaxes(0, 1)
    done = (epoch + jnp.arange(steps) / steps) / settings.epochs
    rates = jnp.asarray(settings.rates)

    def loss(params: Any, batch: Array, target: Any) -> Array:
        def of_seed(params, batch, target):
            return _mean_of(objective.loss, _all(params, batch), target).sum()

        return jax.vmap(of_seed)(params, batch, target).sum()  # heads do not touch one another

    def step(state, given):
        (params, moments), (index, share) = state, given
        batch = _standardise(x[index], *statistics)
        gradients = jax.grad(loss)(params, batch, jax.tree.map(lambda a: a[index], y))
        updates, moments = _optimizer(settings).update(gradients, moments, params)
        now = rates * 0.5 * (1 + jnp.cos(jnp.pi * share))
        updates = jax.tree.map(lambda u: -u * now.reshape(1, -1, *(1,) * (u.ndim - 2)), updates)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, (order, done))[0]


@functools.partial(jax.jit, static_argnames=("objective",))
def _quality(params, x, y, counted, statistics, *, objective):
    """Return the mean quality [S, R, Q] of the `counted` rows of x [chunks, CHUNK, L, D]."""

    def chunk(given):
        x, y, counted = given
        x = _standardise(x, *statistics)

        def of_seed(params):
            def total(logits):
                return (objective.quality(logits, y) * counted).sum()

            return jax.vmap(jax.vmap(total))(_all(params, x))

        return jax.vmap(of_seed)(params)

    return jax.lax.map(chunk, (x, y, counted)).sum(0) / counted.sum()


@functools.partial(jax.jit, static_argnames=("settings",))
def _keep(params: Any, best: Any, better: Array, settings: HeadSettings) -> Any:
    """Return `params` for heads that are `better` [S, R, Q], and `best` for the others."""

    def choose(better: Array) -> Callable[[Array, Array], Array]:
        def of_leaf(new: Array, old: Array) -> Array:
            shape = (*better.shape, *(1,) * (new.ndim - better.ndim))
            return jnp.where(better.reshape(shape), new, old)

        return of_leaf

    heads = {}
    if settings.single:
        layers = better[..., :-1] if settings.mixed else better
        heads["single"] = jax.tree.map(choose(layers), params["single"], best["single"])
    if settings.mixed:
        heads["mixed"] = jax.tree.map(choose(better[..., -1]), params["mixed"], best["mixed"])
    return heads


def _chunks(x: np.ndarray) -> np.ndarray:
    """Return [N, ...] as [chunks, CHUNK, ...], filled with zeros."""
    size = min(CHUNK, len(x))
    padding = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, padding).reshape(-1, size, *x.shape[1:])


def mean_and_std(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of x [N, L, D] over N, f32 [L, D] each.

    The deviation of a constant feature is 1, so that its rounding errors are not scaled up.
    """
    rows = [np.asarray(x[:, layer], np.float64) for layer in range(x.shape[1])]
    mean, std = np.stack([row.mean(0) for row in rows]), np.stack([row.std(0) for row in rows])
    std = np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, 1)
    return mean.astype(np.float32), std.astype(np.float32)


def fit(
    draw: Callable[[int], tuple[Any, Any]],
    valid: tuple[np.ndarray, Any],
    objective: Objective,
    settings: HeadSettings,
    tick: Callable[[], Any] = lambda: None,
) -> Fitted:
    """Train all heads with AdamW and a cosine schedule, and keep each of its best epoch.

    `draw` maps an epoch to training features [N, L, D] and targets [N, ...] of fixed shapes. The
    statistics of the first epoch standardise all features.
    """
    x, y = draw(0)
    statistics = mean_and_std(x)
    layers, width = x.shape[1:]
    size = max(1, min(settings.batch_size, len(x) // 4))
    keys, params, moments = _start(
        layers=layers, width=width, outputs=objective.outputs, settings=settings
    )
    best, quality, epochs = params, -np.inf, 0
    validation = jax.tree.map(_chunks, (*valid, np.ones(len(valid[0]), np.float32)))
    validation = jax.tree.map(jnp.asarray, validation)
    x, y = jax.tree.map(jnp.asarray, (x, y))
    for epoch in range(settings.epochs):
        if epoch:
            x, y = jax.tree.map(jnp.asarray, draw(epoch))
        params, moments = _epoch(
            (params, moments),
            keys,
            x,
            y,
            statistics,
            epoch,
            objective=objective,
            settings=settings,
            size=size,
        )
        now = np.asarray(_quality(params, *validation, statistics, objective=objective))
        better = np.nan_to_num(now, nan=-np.inf) > quality
        best = _keep(params, best, jnp.asarray(better), settings)
        quality, epochs = np.where(better, now, quality), np.where(better, epoch + 1, epochs)
        tick()
    return Fitted(jax.tree.map(np.asarray, best), *statistics, quality, epochs)


def predict(fitted: Fitted, x: Any, choice: int, rate: int) -> np.ndarray:
    """Return the logits [S, N, C] of the heads of one choice and learning rate for x [N, L, D]."""
    layers = len(fitted.mean) if "single" in fitted.params else 0
    mean, std = fitted.mean, fitted.std
    if choice < layers:
        heads = jax.tree.map(lambda a: a[:, rate, choice], fitted.params["single"])
        x, mean, std = x[:, choice], mean[choice], std[choice]
    else:
        heads = jax.tree.map(lambda a: a[:, rate], fitted.params["mixed"])
    # chunks of one size: one compiled program for any N
    logits = [
        np.asarray(_logits(heads, _filled(x[i : i + CHUNK]), mean, std))
        for i in range(0, len(x), CHUNK)
    ]
    return np.concatenate(logits, 1)[:, : len(x)]


def _filled(x: np.ndarray) -> np.ndarray:
    return np.pad(np.asarray(x, np.float32), [(0, CHUNK - len(x))] + [(0, 0)] * (x.ndim - 1))


@jax.jit
def _logits(heads: Any, x: Array, mean: Array, std: Array) -> Array:
    return jax.vmap(one, (0, None))(heads, _standardise(x, mean, std))


def names(fitted_layers: int, settings: HeadSettings, numbers: Sequence[int] = ()) -> list[str]:
    """Return the name of each choice: a layer's number, or "sum"."""
    single = [str(n) for n in (numbers or range(fitted_layers))] if settings.single else []
    return single + (["sum"] if settings.mixed else [])
