"""Heads on frozen features: one for each layer, learning rate and seed, all trained at once.

Shapes: S seeds, R learning rates, L layers, Q choices (each layer, and their weighted sum), N clips
or frames, B of a minibatch, D width, C outputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mert_jax import progress
from mert_jax.probing.objectives import Objective

Array = jax.Array
CHUNK = 1024  # rows of a batch in evaluation
# In standard deviations: a feature that was nearly constant in training must not dominate later
FARTHEST = 10.0


class HeadSettings(NamedTuple):
    """Settings of the training of heads."""

    hidden: int = 0  # width of the hidden layer, 0 for none
    epochs: int = 50
    batch_size: int = 64
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # learning rates to try
    seeds: int = 3
    weight_decay: float = 1e-2
    single: bool = True  # a head for each layer
    mixed: bool = True  # a head for the weighted sum of all layers


class Fitted(NamedTuple):
    """Heads of their best epoch, its quality on validation, and statistics of the features."""

    params: Any
    mean: np.ndarray  # [L, D]
    std: np.ndarray  # [L, D]
    quality: np.ndarray  # [S, R, Q]


@functools.partial(jax.jit, static_argnames=("layers", "width", "outputs", "settings"))
def _start(layers: int, width: int, outputs: int, settings: HeadSettings) -> tuple[Array, Any, Any]:
    """Return the keys of the seeds [S], their heads, alike for all rates, and the moments."""

    def layer(key: Array, shape: tuple[int, ...], scale: float) -> dict[str, Array]:
        weights = jax.random.normal(key, shape) * (scale / np.sqrt(shape[-2]))
        return {"weights": weights, "bias": jnp.zeros((*shape[:-2], shape[-1]))}

    def heads(key: Array, *shape: int) -> dict[str, Any]:
        # the last weights are small, so that untrained ones do not decide
        if not settings.hidden:
            return {"last": layer(key, (*shape, width, outputs), 0.1)}
        first, last = jax.random.split(key)
        hidden = {"first": layer(first, (*shape, width, settings.hidden), 2**0.5)}
        return hidden | {"last": layer(last, (*shape, settings.hidden, outputs), 0.1)}

    def of_seed(key: Array) -> Any:
        single, mixed = jax.random.split(key)
        params = {"single": heads(single, layers)} if settings.single else {}
        if settings.mixed:
            params["mixed"] = heads(mixed) | {"mix": jnp.zeros(layers)}
        shape = (len(settings.rates),)
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], shape + x.shape), params)

    keys = jax.vmap(jax.random.key)(jnp.arange(settings.seeds))
    params = jax.vmap(of_seed)(keys)
    return keys, params, _optimizer(settings).init(params)


def one(head: dict[str, Any], x: Array) -> Array:
    """Return the logits [N, C] of one head for x [N, D], or [N, L, D] if it weighs layers."""
    if "mix" in head:
        x = jnp.einsum("l,nld->nd", jax.nn.softmax(head["mix"]), x)
    if "first" in head:
        x = jax.nn.relu(x @ head["first"]["weights"] + head["first"]["bias"][None])
    return x @ head["last"]["weights"] + head["last"]["bias"][None]


def _all(params: Any, x: Array) -> Array:
    """Return the logits [R, Q, N, C] of all heads of one seed for x [N, L, D]."""
    logits = []
    if "single" in params:
        each_layer = jax.vmap(one, (0, 1))
        logits.append(jax.vmap(each_layer, (0, None))(params["single"], x))
    if "mixed" in params:
        logits.append(jax.vmap(one, (0, None))(params["mixed"], x)[:, None])
    return jnp.concatenate(logits, 1)


def _each(function: Callable, logits: Array, target: Any) -> Array:
    """Return `function` [R, Q, N] of the logits [R, Q, N, C] of each head."""
    return jax.vmap(jax.vmap(lambda x: function(x, target)))(logits)


def _standardise(x: Array, mean: Array, std: Array) -> Array:
    leading = (None,) * (x.ndim - mean.ndim)
    z = (x.astype(jnp.float32) - mean[leading]) / std[leading]
    return jnp.clip(z, -FARTHEST, FARTHEST)


def _optimizer(settings: HeadSettings) -> optax.GradientTransformation:
    """Return AdamW without its learning rate, which differs between heads."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay))


@functools.partial(jax.jit, static_argnames=("objective", "settings"))
def _train(state, keys, x, y, statistics, epoch, objective, settings):
    """Train one epoch on x [N, L, D] in minibatches, each seed in its own order."""
    size = max(1, min(settings.batch_size, len(x) // 4))
    steps = len(x) // size
    turn = jax.vmap(lambda k: jax.random.fold_in(k, epoch))(keys)
    order = jax.vmap(lambda k: jax.random.permutation(k, len(x)))(turn)
    order = order[:, : steps * size].reshape(-1, steps, size).swapaxes(0, 1)
    done = (epoch + jnp.arange(steps) / steps) / settings.epochs

    def loss(params: Any, batch: Array, target: Any) -> Array:
        def of_seed(params: Any, batch: Array, target: Any) -> Array:
            return _each(objective.loss, _all(params, batch), target).mean(-1).sum()

        return jax.vmap(of_seed)(params, batch, target).sum()  # heads do not touch one another

    def step(state, given):
        (params, moments), (index, share) = state, given
        batch = _standardise(x[index], *statistics)
        gradients = jax.grad(loss)(params, batch, jax.tree.map(lambda a: a[index], y))
        updates, moments = _optimizer(settings).update(gradients, moments, params)
        now = jnp.asarray(settings.rates) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        updates = jax.tree.map(lambda u: -u * now.reshape(1, -1, *(1,) * (u.ndim - 2)), updates)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, (order, done))[0]


@functools.partial(jax.jit, static_argnames=("objective",))
def _keep_best(params, best, quality, validation, statistics, objective):
    """Update the `best` heads and their quality [S, R, Q] on chunks of x, y and weights."""
    of_row = objective.quality or (lambda logits, target: -objective.loss(logits, target))

    def chunk(given):
        x, y, weights = given
        x = _standardise(x, *statistics)
        each = jax.vmap(lambda heads: _each(of_row, _all(heads, x), y))(params)
        return (each * weights[None, None, None]).sum(-1)

    now = jax.lax.map(chunk, validation).sum(0) / validation[-1].sum()
    better = now > quality  # false for NaN
    layers = len(statistics[0])
    masks = {"single": better[..., :layers], "mixed": better[..., -1]}

    def choose(mask: Array, new: Array, old: Array) -> Array:
        return jnp.where(jnp.expand_dims(mask, range(mask.ndim, new.ndim)), new, old)

    best = {k: jax.tree.map(functools.partial(choose, masks[k]), params[k], best[k]) for k in best}
    return best, jnp.where(better, now, quality)


def _chunks(x: np.ndarray, size: int) -> np.ndarray:
    """Return [N, ...] as [chunks, size, ...], filled with zeros."""
    padding = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, padding).reshape(-1, size, *x.shape[1:])


def mean_and_std(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of x [N, L, D] over N, f32 [L, D] each.

    The deviation of a constant feature is 1, so that its rounding errors are not scaled up.
    """
    layers = (np.asarray(x[:, layer], np.float64) for layer in range(x.shape[1]))
    mean, std = np.stack([(layer.mean(0), layer.std(0)) for layer in layers], 1)
    std = np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, 1)
    return mean.astype(np.float32), std.astype(np.float32)


def fit(
    draw: Callable[[int], tuple], valid: tuple, objective: Objective, settings: HeadSettings
) -> Fitted:
    """Train all heads with AdamW and a cosine schedule, and keep each of its best epoch.

    `draw` maps an epoch to training features [N, L, D] and targets [N, ...] of fixed shapes, those
    of validation are `valid`. The statistics of the first epoch standardise all features.
    """
    x, y = draw(0)
    statistics = mean_and_std(x)
    layers, width = x.shape[1:]
    keys, params, moments = _start(layers, width, objective.outputs, settings)
    rows = len(valid[0])
    validation = (*valid, np.ones(rows, np.float32))
    validation = jax.tree.map(lambda a: jnp.asarray(_chunks(a, min(CHUNK, rows))), validation)
    choices = layers * settings.single + settings.mixed
    best, quality = params, jnp.full((settings.seeds, len(settings.rates), choices), -jnp.inf)
    with progress.bar("heads", settings.epochs, "epoch") as bar:
        for epoch in range(settings.epochs):
            x, y = jax.tree.map(jnp.asarray, draw(epoch) if epoch else (x, y))
            state = params, moments
            params, moments = _train(state, keys, x, y, statistics, epoch, objective, settings)
            best, quality = _keep_best(params, best, quality, validation, statistics, objective)
            bar.update(1)
    return Fitted(*jax.tree.map(np.asarray, (best, *statistics, quality)))


def predict(fitted: Fitted, x: Any, choice: int, rate: int) -> np.ndarray:
    """Return the logits [S, N, C] of the heads of one choice and learning rate for x [N, L, D]."""
    mean, std = fitted.mean, fitted.std
    if "single" in fitted.params and choice < len(mean):
        heads = jax.tree.map(lambda a: a[:, rate, choice], fitted.params["single"])
        x, mean, std = x[:, choice], mean[choice], std[choice]
    else:
        heads = jax.tree.map(lambda a: a[:, rate], fitted.params["mixed"])
    # chunks of one size: one compiled program for any N
    chunks = (np.asarray(x[i : i + CHUNK], np.float32) for i in range(0, len(x), CHUNK))
    logits = [_logits(heads, _chunks(a, CHUNK)[0], mean, std) for a in chunks]
    return np.concatenate(logits, 1)[:, : len(x)]


@jax.jit
def _logits(heads: Any, x: Array, mean: Array, std: Array) -> Array:
    return jax.vmap(one, (0, None))(heads, _standardise(x, mean, std))
