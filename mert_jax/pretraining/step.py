"""The training step and the evaluation step: pure functions of state and batch.

Shapes: B clips, A micro-batches, N samples, T frames, K codebooks, V classes, F feature bins.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mert_jax.checkpoints.train_state import TrainState, initial_guard
from mert_jax.constants import FULL_SCALE
from mert_jax.pretraining import guard, losses

Array = jax.Array
Codes = Mapping[str, Array]  # stored codes [B, T, K] by teacher

CODEBOOKS_STREAM = 0x626F  # folded into a step's key to draw codebooks
# Parts of a batch that the step returns unchanged, so that every host sees those of all hosts:
# record ids, which of them could not be read, and each host's request to save or stop.
NOTES = ("record", "faulty", "requests")


def begin(params: Any, optimizer: optax.GradientTransformation, window: int) -> TrainState:
    """Return the state before the first step; the guard remembers `window` gradient norms."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, optimizer.init(params), initial_guard(window))


class Objective(NamedTuple):
    """The functions and weights that define the loss, fixed for a run."""

    student: Callable[..., Any]  # (params, wave, mask, T, dropout key or None) -> Output
    num_frames: Callable[[int], int]  # N -> T
    teachers: Mapping[str, Callable[[Any, Array], Array]]  # (params, wave) -> targets [B, T, ...]
    weights: Mapping[str, float]  # of the teachers' losses
    mask: Callable[[Array, int], Array]  # (keys [B], T) -> bool [B, T]
    mixture: Callable[[Array, Array], Array]  # (keys [B], wave [B, N]) -> wave with noise
    logit_temperature: float
    special_codes: int  # number of classes before code 0 (4 in fairseq's dictionary)
    penalty_weight: float  # of the features penalty
    unmasked_weight: float = 0.0  # of the cross-entropy at unmasked frames
    codebooks_per_step: int = 0  # of each teacher, drawn for a step; 0 means all
    context: Mapping[str, int] = {}  # samples before the clip that a teacher hears in addition

    @property
    def longest_context(self) -> int:
        """Samples that a batch's audio has before its clips."""
        return max(self.context.values(), default=0)

    def subset(self, num_codebooks: int) -> int:
        """Return how many of a teacher's codebooks a training step draws, 0 for all."""
        return self.codebooks_per_step if self.codebooks_per_step < num_codebooks else 0


class Sums(NamedTuple):
    """Sums over masked frames, additive over micro-batches, batches and devices."""

    frames: Array  # number of masked frames
    loss: Array  # the objective
    codes: dict[str, losses.CodeLoss]  # by teacher
    features: dict[str, Array]  # squared error by teacher
    penalty: Array  # features penalty times masked frames
    unmasked: Array | None = None  # weighted cross-entropy at the other frames, if computed


def row_keys(key: Array, rows: Array) -> Array:
    """Return one key for each global row, so that draws depend on no micro-batch and no host."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def compute_targets(
    objective: Objective, teacher_params: Any, wave: Array, length: int, codes: Codes | None = None
) -> dict[str, Array]:
    """Return each teacher's targets [B, T, ...] for the clean `wave` [B, context + N].

    Stored `codes` replace the teachers of these names. Frame i of a teacher goes with
    frame i of the student; T is `length` or the number of frames of the shortest target.
    """
    targets = {}
    for name, apply in objective.teachers.items():
        if codes and name in codes:
            targets[name] = codes[name].astype(jnp.int32)
        else:
            start = objective.longest_context - objective.context.get(name, 0)
            targets[name] = apply(teacher_params[name], wave[:, start:])
    num_frames = min(length, *(target.shape[1] for target in targets.values()))
    return jax.lax.stop_gradient({name: x[:, :num_frames] for name, x in targets.items()})


def code_sums(
    objective: Objective, prediction: tuple, codes: Array, mask: Array, key: Array | None
) -> losses.CodeLoss:
    """Return the loss of a teacher's `codes` [B, T, K]; with a `key`, of a random subset."""
    proj, codebooks = prediction  # [B, T, K, d] and class embeddings [K, V, d]
    num_codebooks, temperature = codes.shape[-1], objective.logit_temperature
    classes = codes + objective.special_codes
    subset = objective.subset(num_codebooks)
    if key is None or not subset:
        logits = losses.cosine_logits(proj, codebooks, temperature)
        return losses.code_loss(logits, classes, mask, 1 / temperature)
    drawn = jax.random.choice(key, num_codebooks, (subset,), replace=False)
    logits = losses.cosine_logits(proj[:, :, drawn], codebooks[drawn], temperature)
    sums = losses.code_loss(logits, classes[..., drawn], mask, 1 / temperature)
    return jax.tree.map(
        lambda x: jnp.zeros((num_codebooks, *x.shape[1:]), x.dtype).at[drawn].set(x), sums
    )


def masked_sums(
    objective: Objective, output: Any, targets: Mapping[str, Array], mask: Array, key: Array | None
) -> Sums:
    """Return the objective at the masked frames (MERT, arXiv 2306.00107, eq. 1 to 3).

    With a `key`, a random subset of the codebooks stands for all of them, scaled to their number.
    """
    frames = mask.sum()
    penalty = output.features_penalty * frames
    loss = objective.penalty_weight * penalty
    codes, features, unmasked = {}, {}, None
    for i, (name, target) in enumerate(targets.items()):
        prediction, weight = output.predictions[name], objective.weights[name]
        if not jnp.issubdtype(target.dtype, jnp.integer):
            features[name] = losses.feature_loss(prediction, target.astype(prediction.dtype), mask)
            loss += weight * features[name]
            continue
        subset = objective.subset(target.shape[-1])
        if key is not None and subset:
            weight *= target.shape[-1] / subset
        codebooks_key = None if key is None else jax.random.fold_in(key, i)
        sums_at = functools.partial(code_sums, objective, prediction, target, key=codebooks_key)
        codes[name] = sums_at(mask)
        loss += weight * codes[name].cross_entropy.sum()
        if objective.unmasked_weight:  # HuBERT, arXiv 2106.07447, eq. 2
            part = weight * objective.unmasked_weight * sums_at(~mask).cross_entropy.sum()
            unmasked = part if unmasked is None else unmasked + part
    if unmasked is not None:
        loss += unmasked
    return Sums(frames, loss, codes, features, penalty, unmasked)


def loss_fn(
    params: Any,
    teacher_params: Any,
    audio: Array,
    rows: Array,
    key: Array,
    objective: Objective,
    train: bool,
    codes: Codes | None = None,
) -> tuple[Array, Sums]:
    """Return the summed objective of `audio` int16 [B, context + N], and its parts.

    `rows` int [B] are the clips' numbers in the global batch, `key` is that of the step.
    """
    wave = audio.astype(jnp.float32) / FULL_SCALE
    clip = wave[:, objective.longest_context :]
    num_frames = objective.num_frames(clip.shape[-1])
    targets = compute_targets(objective, teacher_params, wave, num_frames, codes)
    length = next(iter(targets.values())).shape[1]
    mask_key, mixture_key, dropout_key = jax.random.split(key, 3)
    mask = objective.mask(row_keys(mask_key, rows), length)
    if train:
        clip = objective.mixture(row_keys(mixture_key, rows), clip)
        # one stream for each micro-batch, named by its first row
        dropout_key = jax.random.fold_in(dropout_key, rows[0])
        # the same codebooks in all micro-batches of a step
        codebooks_key = jax.random.fold_in(key, CODEBOOKS_STREAM)
    else:
        dropout_key = codebooks_key = None
    output = objective.student(params, clip, mask, length, dropout_key)
    sums = masked_sums(objective, output, targets, mask, codebooks_key)
    return sums.loss, sums


def split(x: Array, accumulation: int, group: int) -> Array:
    """Split [B, ...] into micro-batches [A, B / A, ...] of whole groups, from every device."""
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
    """Make one update on a global batch and return the new state and the metrics.

    The batch has `audio` int16 [B, context + N], `looped` bool [B], stored `codes`, and `NOTES`;
    `key` is the run's. The gradient is that of the sum over masked frames divided by their number,
    computed in `accumulation` micro-batches of whole groups (`group` clips share their noise). An
    update that the guard rejects (`guard.limit`) changes neither parameters nor moments.
    """
    key = jax.random.fold_in(key, state.batch)
    gradient = jax.grad(loss_fn, has_aux=True)

    def micro_batch(audio: Array, rows: Array, codes: Codes) -> tuple[Any, Sums]:
        return gradient(state.params, teacher_params, audio, rows, key, objective, True, codes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro_batch(*part)), None

    inputs = (batch["audio"], jnp.arange(batch["audio"].shape[0]), batch.get("codes", {}))
    if accumulation == 1:
        grads, sums = micro_batch(*inputs)
    else:
        parts = jax.tree.map(lambda x: split(x, accumulation, group), inputs)
        shapes = jax.eval_shape(micro_batch, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g: g / sums.frames, grads)
    norm = optax.tree.norm(grads)
    accepted = guard.accepts(state.guard, sums.loss / sums.frames, norm, norm_factor)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = optax.apply_updates(state.params, updates), opt_state
    old = state.params, state.opt_state
    params, opt_state = jax.tree.map(lambda x, y: jnp.where(accepted, x, y), new, old)
    next_guard = guard.after(state.guard, norm, accepted)
    metrics = {
        "sums": sums,
        "grad_norm": norm,
        "norm_limit": guard.limit(state.guard, norm_factor),
        "looped": batch["looped"].sum(),
        "updates": state.step - state.guard.skipped,  # before this one
        "guard": next_guard._replace(norms=()),
        "notes": {name: batch[name] for name in NOTES if name in batch},
    }
    return TrainState(state.step + 1, state.batch + 1, params, opt_state, next_guard), metrics


def eval_step(
    params: Any, teacher_params: Any, batch: Mapping[str, Array], key: Array, objective: Objective
) -> Sums:
    """Return the sums of a validation batch: masked, without mixture and dropout."""
    audio, codes = batch["audio"], batch.get("codes", {})
    rows = jnp.arange(audio.shape[0])
    return loss_fn(params, teacher_params, audio, rows, key, objective, False, codes)[1]
