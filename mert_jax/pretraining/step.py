"""One training step and one evaluation step: pure functions of state and batch.

Shapes: B clips, A micro-batches, N samples, T frames, K codebooks, V classes, F feature bins.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mert_jax.checkpoints.train_state import TrainState, initial_guard
from mert_jax.constants import FULL_SCALE
from mert_jax.pretraining import guard, losses
from mert_jax.sharding import placed

Array = jax.Array


BOOKS = 0x626F  # folded into a step's key: the draw of codebooks
# parts of a batch that a step returns, so that every host knows those of all: record ids, the
# faulty ones among them, and each host's request to save or stop
NOTES = ("record", "faulty", "requests")


def begin(params: Any, optimizer: optax.GradientTransformation, window: int) -> TrainState:
    """The state before the first step; the guard remembers `window` gradient norms."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, optimizer.init(params), initial_guard(window))


class Objective(NamedTuple):
    """What is trained on what: functions and plain numbers, fixed for a run.

    student: (params, wave, mask, num_frames, rngs or None) -> model.Output; num_frames: N -> T;
    teachers: name -> apply; weights: name -> loss weight; mask: (keys [B], T) -> bool [B, T];
    mixture: (keys [B], wave) -> wave; special_codes: classes before code 0 (fairseq's dictionary
    has 4); penalty: weight of the features penalty; unmasked_weight: of the cross-entropy at frames
    that are not masked; codebooks_per_step: of each teacher, drawn anew each step (0: all);
    context: name -> samples before the clip that a teacher hears and cuts off.
    """

    student: Callable[..., Any]
    num_frames: Callable[[int], int]
    teachers: Mapping[str, Callable[[Any, Array], Array]]
    weights: Mapping[str, float]
    mask: Callable[[Array, int], Array]
    mixture: Callable[[Array, Array], Array]
    logit_temperature: float
    special_codes: int
    penalty: float
    unmasked_weight: float = 0.0
    codebooks_per_step: int = 0
    context: Mapping[str, int] = {}


class Sums(NamedTuple):
    """Sums over masked frames, which add up over micro-batches, batches and devices.

    frames: masked frames; loss: the whole objective; codes: name -> CodeLoss; features: name ->
    sum of the regression losses; penalty: features penalty times masked frames; visible: weighted
    cross-entropy at the frames that are not masked, None where it has no weight.
    """

    frames: Array
    loss: Array
    codes: dict[str, losses.CodeLoss]
    features: dict[str, Array]
    penalty: Array
    visible: Array | None = None


def row_keys(key: Array, rows: Array) -> Array:
    """A key for each global row, so that draws do not depend on micro-batches or hosts."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def targets(
    objective: Objective,
    teacher_params: Any,
    wave: Array,
    length: int,
    codes: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """What each teacher says of the clean `wave` [B, context + N], cut at the end to T frames:
    stored `codes` [B, T, K] where it has some, computed otherwise.

    T is `length` or the shortest row of codes. Features and codes are never shifted: frame i of a
    teacher goes with frame i of the student.
    """
    before = max(objective.context.values(), default=0)
    heard = lambda name: wave[:, before - objective.context.get(name, 0) :]
    full = {name: stored.astype(jnp.int32) for name, stored in (codes or {}).items()}
    full = {
        name: full[name] if name in full else apply(teacher_params[name], heard(name))
        for name, apply in objective.teachers.items()
    }
    full = jax.lax.stop_gradient(full)
    frames = [length] + [target.shape[1] for target in full.values()]
    return {name: target[:, : min(frames)] for name, target in full.items()}


def code_sums(
    objective: Objective,
    predicted: tuple[Array, Array],
    expected: Array,
    mask: Array,
    key: Array | None,
) -> losses.CodeLoss:
    """The code losses of a teacher, expected int [B, T, K]; with a key, those of a random subset of
    `codebooks_per_step` books, the others' entries 0."""
    proj, codebooks = predicted
    temperature = objective.logit_temperature
    number, few = expected.shape[-1], objective.codebooks_per_step
    expected = expected + objective.special_codes
    if key is None or not 0 < few < number:
        logits = losses.cosine_logits(proj, codebooks, temperature)
        return losses.code_loss(logits, expected, mask, 1 / temperature)
    books = jax.random.choice(key, number, (few,), replace=False)
    logits = losses.cosine_logits(proj[:, :, books], codebooks[books], temperature)
    drawn = losses.code_loss(logits, expected[..., books], mask, 1 / temperature)
    return jax.tree.map(
        lambda x: jnp.zeros((number, *x.shape[1:]), x.dtype).at[books].set(x), drawn
    )


def masked_sums(
    objective: Objective,
    output: Any,
    target: Mapping[str, Array],
    mask: Array,
    key: Array | None = None,
) -> Sums:
    """The objective at the masked frames: weighted sums of cross-entropy over codebooks and of
    squared error, plus the features penalty once a frame (MERT, arXiv 2306.00107, eq. 1 to 3).

    With a `key`, a random subset of the codebooks stands for all, K over their number as heavy.
    """
    frames = mask.sum()
    penalty = output.features_penalty * frames
    loss = objective.penalty * penalty
    codes, features, visible = {}, {}, None
    for i, (name, expected) in enumerate(target.items()):
        predicted = output.predictions[name]
        if jnp.issubdtype(expected.dtype, jnp.integer):
            number, few = expected.shape[-1], objective.codebooks_per_step
            subset = key is not None and 0 < few < number
            weight = objective.weights[name] * (number / few if subset else 1)
            books_key = None if key is None else jax.random.fold_in(key, i)
            sums = functools.partial(code_sums, objective, predicted, expected, key=books_key)
            codes[name] = sums(mask)
            loss += weight * codes[name].cross_entropy.sum()
            if objective.unmasked_weight:  # HuBERT, arXiv 2106.07447, eq. 2
                seen = weight * objective.unmasked_weight * sums(~mask).cross_entropy.sum()
                visible = seen if visible is None else visible + seen
        else:
            features[name] = losses.feature_loss(predicted, expected.astype(predicted.dtype), mask)
            loss += objective.weights[name] * features[name]
    loss += 0 if visible is None else visible
    return Sums(frames, loss, codes, features, penalty, visible)


def loss_fn(
    params: Any,
    teacher_params: Any,
    audio: Array,
    rows: Array,
    key: Array,
    objective: Objective,
    train: bool,
    codes: Mapping[str, Array] | None = None,
) -> tuple[Array, Sums]:
    """The summed objective of int16 `audio` [B, context + N] with global row numbers `rows` [B] and
    stored `codes`, by teacher [B, T, K]."""
    wave = audio.astype(jnp.float32) / FULL_SCALE
    before = max(objective.context.values(), default=0)
    num_frames = objective.num_frames(wave.shape[-1] - before)
    target = targets(objective, teacher_params, wave, num_frames, codes)
    wave = wave[:, before:]
    length = next(iter(target.values())).shape[1]
    mask_key, mixture_key, dropout_key = jax.random.split(key, 3)
    mask = objective.mask(row_keys(mask_key, rows), length)
    if train:
        wave = objective.mixture(row_keys(mixture_key, rows), wave)
        # one stream a micro-batch, named by its first row
        dropout_key = jax.random.fold_in(dropout_key, rows[0])
    output = objective.student(params, wave, mask, length, dropout_key if train else None)
    # one subset of the codebooks a step, whatever the micro-batch
    books_key = jax.random.fold_in(key, BOOKS) if train else None
    sums = masked_sums(objective, output, target, mask, books_key)
    return sums.loss, sums


def split(x: Array, accumulation: int, group: int) -> Array:
    """[B, ...] -> [A, B / A, ...], dealing out whole groups in turn, so that each micro-batch has
    rows of every device."""
    x = x.reshape(-1, accumulation, group, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0).reshape(accumulation, -1, *x.shape[3:])


def train_step(
    state: TrainState,
    teacher_params: Any,
    batch: Mapping[str, Array],
    key: Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    group: int,
    norm_factor: float = 0.0,
) -> tuple[TrainState, dict[str, Any]]:
    """One update on the global batch (`audio` int16 [B, N], `looped` bool [B], stored `codes`, and
    `NOTES`, which are handed on); returns the state and the metrics.

    `key` is the run's; the batch's own is folded in. The gradient is that of the whole batch's sum
    over its masked frames, however many micro-batches it is computed in. An update that the guard
    does not accept (`norm_factor`: see `guard.limit`) changes neither parameters nor moments.
    """
    key = jax.random.fold_in(key, state.batch)
    gradient = jax.grad(loss_fn, has_aux=True)

    def micro_batch(audio: Array, rows: Array, codes: Mapping[str, Array]) -> tuple[Any, Sums]:
        return gradient(state.params, teacher_params, audio, rows, key, objective, True, codes)

    rows = jnp.arange(batch["audio"].shape[0])
    whole = (batch["audio"], rows, batch.get("codes", {}))
    if accumulation == 1:
        grads, sums = micro_batch(*whole)
    else:
        batches = jax.tree.map(lambda x: split(x, accumulation, group), whole)
        first = jax.eval_shape(micro_batch, *jax.tree.map(lambda x: x[0], batches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        add = lambda total, batch: (jax.tree.map(jnp.add, total, micro_batch(*batch)), None)
        (grads, sums), _ = jax.lax.scan(add, zeros, batches)
    grads = jax.tree.map(lambda g: g / sums.frames, grads)
    norm = optax.tree.norm(grads)
    accepted = guard.accepts(state.guard, sums.loss / sums.frames, norm, norm_factor)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(accepted, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    watched = guard.after(state.guard, norm, accepted)
    metrics = {
        "sums": sums,
        "grad_norm": norm,
        "norm_limit": guard.limit(state.guard, norm_factor),
        "looped": batch["looped"].sum(),
        "updates": state.step - state.guard.skipped,  # made before this one
        "guard": watched._replace(norms=()),
        "notes": {name: batch[name] for name in NOTES if name in batch},
    }
    return TrainState(state.step + 1, state.batch + 1, params, opt_state, watched), metrics


def redirect(state: TrainState, batch: int, rollbacks: int) -> TrainState:
    """Return `state` with another next batch and number of rollbacks."""
    place = lambda new, old: placed(np.int32(new), old.sharding)
    watched = state.guard._replace(rollbacks=place(rollbacks, state.guard.rollbacks))
    return state._replace(batch=place(batch, state.batch), guard=watched)


def eval_step(
    params: Any,
    teacher_params: Any,
    batch: Mapping[str, Array],
    key: Array,
    *,
    objective: Objective,
) -> Sums:
    """Sums over one validation batch: masked, but neither mixed nor dropped out."""
    audio = batch["audio"]
    rows = jnp.arange(audio.shape[0])
    codes = batch.get("codes", {})
    return loss_fn(params, teacher_params, audio, rows, key, objective, False, codes)[1]


def compiled(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    group: int,
    norm_factor: float,
    shardings: Any,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`train_step`, which takes the state's memory over and lays it out by `shardings`, and
    `eval_step`, both jitted; all that they say is whole on every device."""
    options = dict(
        optimizer=optimizer, accumulation=accumulation, group=group, norm_factor=norm_factor
    )
    update = functools.partial(train_step, objective=objective, **options)
    evaluate = functools.partial(eval_step, objective=objective)
    whole = shardings.step
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, whole))
    return jitted, jax.jit(evaluate, out_shardings=whole)
