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
CHUNK = 1024  # rows at once where nothing is learnt
# Standard deviations: a feature that hardly moved in training must not outvote all others where it
# does.
FARTHEST = 10.0
START = 0.1  # of the usual size of first weights: what was never trained should not decide


class HeadSettings(NamedTuple):
    """How heads are trained. hidden: width of the hidden layer, 0: none. single, mixed: whether
    each layer has its own head, and the weighted sum of all."""

    hidden: int = 0
    epochs: int = 50
    batch_size: int = 64
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 3
    weight_decay: float = 1e-2
    single: bool = True
    mixed: bool = True


class Fitted(NamedTuple):
    """Heads of the best epoch each, the statistics their features are standardised with [L, D], and
    their quality on validation [S, R, Q]."""

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
    """Heads of one seed, equal for all learning rates."""

    def heads(key: Array, shape: tuple[int, ...]) -> dict[str, Any]:
        if not settings.hidden:
            return {"last": _layer(key, width, outputs, shape)}
        first, last = jax.random.split(key)
        return {
            "first": _layer(first, width, settings.hidden, shape, 2**0.5),
            "last": _layer(last, settings.hidden, outputs, shape),
        }

    single, mixed = jax.random.split(key)
    made = {}
    if settings.single:
        made["single"] = heads(single, (layers,))
    if settings.mixed:
        made["mixed"] = heads(mixed, ()) | {"mix": jnp.zeros(layers)}
    several = lambda x: jnp.broadcast_to(x[None], (len(settings.rates), *x.shape))
    return jax.tree.map(several, made)


@functools.partial(jax.jit, static_argnames=("layers", "width", "outputs", "settings"))
def _start(layers: int, width: int, outputs: int, settings: HeadSettings) -> tuple[Array, Any, Any]:
    """The seeds' keys [S], their heads, and the optimizer's moments of these."""
    keys = jax.vmap(jax.random.key)(jnp.arange(settings.seeds))
    made = jax.vmap(lambda key: _init(key, layers, width, outputs, settings))(keys)
    return keys, made, _optimizer(settings).init(made)


def _affine(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["weights"] + layer["bias"][None]


def one(head: dict[str, Any], x: Array) -> Array:
    """Logits [N, C] of one head: of x [N, D], or of x [N, L, D] where it weighs layers."""
    if "mix" in head:
        x = jnp.einsum("l,nld->nd", jax.nn.softmax(head["mix"]), x)
    if "first" in head:
        x = jax.nn.relu(_affine(head["first"], x))
    return _affine(head["last"], x)


def _all(params: Any, x: Array) -> Array:
    """Logits [R, Q, N, C] of all heads of one seed, x [N, L, D]."""
    found = []
    if "single" in params:
        each_layer = jax.vmap(one, (0, 1))
        found.append(jax.vmap(each_layer, (0, None))(params["single"], x))
    if "mixed" in params:
        found.append(jax.vmap(one, (0, None))(params["mixed"], x)[:, None])
    return jnp.concatenate(found, 1)


def _standardise(x: Array, mean: Array, std: Array) -> Array:
    leading = (None,) * (x.ndim - mean.ndim)
    found = (x.astype(jnp.float32) - mean[leading]) / std[leading]
    return jnp.clip(found, -FARTHEST, FARTHEST)


def _mean_of(function: Callable, logits: Array, target: Any) -> Array:
    """Mean over N of `function`, for logits [R, Q, N, C]: [R, Q]."""
    return jax.vmap(jax.vmap(lambda x: function(x, target).mean()))(logits)


def _optimizer(settings: HeadSettings) -> optax.GradientTransformation:
    """AdamW without its learning rate, which differs from head to head."""
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(settings.weight_decay))


@functools.partial(jax.jit, static_argnames=("objective", "settings", "size"))
def _epoch(state, keys, x, y, statistics, epoch, *, objective, settings, size):
    """Pass number `epoch` over x [N, L, D], in minibatches of `size`, each seed in its order."""
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
        scaled = lambda u: -u * now.reshape(1, -1, *(1,) * (u.ndim - 2))
        return (optax.apply_updates(params, jax.tree.map(scaled, updates)), moments), None

    return jax.lax.scan(step, state, (order, done))[0]


@functools.partial(jax.jit, static_argnames=("objective",))
def _quality(params, x, y, counted, statistics, *, objective):
    """Mean quality [S, R, Q] of those rows of x [chunks, CHUNK, L, D] that are `counted`."""

    def chunk(given):
        x, y, counted = given
        x = _standardise(x, *statistics)

        def of_seed(params):
            total = lambda logits: (objective.quality(logits, y) * counted).sum()
            return jax.vmap(jax.vmap(total))(_all(params, x))

        return jax.vmap(of_seed)(params)

    return jax.lax.map(chunk, (x, y, counted)).sum(0) / counted.sum()


@functools.partial(jax.jit, static_argnames=("settings",))
def _keep(params: Any, best: Any, better: Array, settings: HeadSettings) -> Any:
    """`params` where a head is `better` [S, R, Q] than its `best`, leaf by leaf."""

    def choose(better: Array) -> Callable[[Array, Array], Array]:
        shape = lambda x: better.reshape(*better.shape, *(1,) * (x.ndim - better.ndim))
        return lambda new, old: jnp.where(shape(new), new, old)

    kept = {}
    if settings.single:
        layers = better[..., :-1] if settings.mixed else better
        kept["single"] = jax.tree.map(choose(layers), params["single"], best["single"])
    if settings.mixed:
        kept["mixed"] = jax.tree.map(choose(better[..., -1]), params["mixed"], best["mixed"])
    return kept


def _chunks(x: np.ndarray) -> np.ndarray:
    """[N, ...] as [chunks, CHUNK, ...], with zeros at the end."""
    size = min(CHUNK, len(x))
    padding = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, padding).reshape(-1, size, *x.shape[1:])


def mean_and_std(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of x [N, L, D] over N, f32[L, D] each; a feature that never changes says nothing, and is not
    divided by its rounding errors."""
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
    """Train all heads with AdamW and a cosine schedule, each kept as of its best epoch.

    draw: epoch -> training features [N, L, D] and targets [N, ...], the same numbers of them each
    time. The statistics of the first epoch's features standardise all.
    """
    x, y = draw(0)
    statistics = mean_and_std(x)
    layers, width = x.shape[1:]
    size = max(1, min(settings.batch_size, len(x) // 4))
    keys, params, moments = _start(
        layers=layers, width=width, outputs=objective.outputs, settings=settings
    )
    best, quality, epochs = params, -np.inf, 0
    held = jax.tree.map(_chunks, (*valid, np.ones(len(valid[0]), np.float32)))
    held = jax.tree.map(jnp.asarray, held)
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
        now = np.asarray(_quality(params, *held, statistics, objective=objective))
        better = np.nan_to_num(now, nan=-np.inf) > quality
        best = _keep(params, best, jnp.asarray(better), settings)
        quality, epochs = np.where(better, now, quality), np.where(better, epoch + 1, epochs)
        tick()
    return Fitted(jax.tree.map(np.asarray, best), *statistics, quality, epochs)


def predict(fitted: Fitted, x: Any, choice: int, rate: int) -> np.ndarray:
    """Logits [S, N, C] of the heads of one choice (the last one may be the weighted sum) and one
    learning rate, for x [N, L, D]."""
    layers = len(fitted.mean) if "single" in fitted.params else 0
    mean, std = fitted.mean, fitted.std
    if choice < layers:
        heads = jax.tree.map(lambda a: a[:, rate, choice], fitted.params["single"])
        x, mean, std = x[:, choice], mean[choice], std[choice]
    else:
        heads = jax.tree.map(lambda a: a[:, rate], fitted.params["mixed"])
    # one size of program for any N
    found = [
        np.asarray(_logits(heads, _filled(x[i : i + CHUNK]), mean, std))
        for i in range(0, len(x), CHUNK)
    ]
    return np.concatenate(found, 1)[:, : len(x)]


def _filled(x: np.ndarray) -> np.ndarray:
    return np.pad(np.asarray(x, np.float32), [(0, CHUNK - len(x))] + [(0, 0)] * (x.ndim - 1))


@jax.jit
def _logits(heads: Any, x: Array, mean: Array, std: Array) -> Array:
    return jax.vmap(one, (0, None))(heads, _standardise(x, mean, std))


def names(fitted_layers: int, settings: HeadSettings, numbers: Sequence[int] = ()) -> list[str]:
    """What each choice is called: a layer's number, or "sum"."""
    single = [str(n) for n in (numbers or range(fitted_layers))] if settings.single else []
    return single + (["sum"] if settings.mixed else [])
