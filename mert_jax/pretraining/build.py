"""Turns a config into an experiment: student, teachers, objective, optimiser, compiled steps.

No other module of a run reads the config; all others take numbers, arrays and functions.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mert_jax import sharding, teachers
from mert_jax.checkpoints import init_from, tensor_names
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.checkpoints.in_memory import About
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import loader
from mert_jax.data.loader import Loader, Stored
from mert_jax.data.stored_codes import CodesInfo
from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.pretraining import masking, mixture, optimizer, step
from mert_jax.pretraining.loop import Intervals
from mert_jax.teachers.teacher import Teacher

NO_CODES: Stored = {}


def check(config: ConfigDict | None) -> ConfigDict:
    """Return `config`. Raises UserError if its numbers do not go together."""
    if config is None:
        raise UserError("--config=FILE is needed, such as --config=configs/tiny.py")
    if problem := next(_problems(config), None):
        raise UserError(problem)
    return config


def _problems(config: ConfigDict) -> Iterator[str]:
    data, model, objective = config.data, config.model, config.objective
    if objective.codebooks_per_step < 0:
        yield f"objective.codebooks_per_step is {objective.codebooks_per_step}; 0 means all"
    for key in "total_steps batch_size accumulation group log_every eval_every".split():
        if config[key] < 1:
            yield f"{key} is {config[key]}; it must be at least 1"
    if not config.teachers or len(set(config.teachers)) < len(config.teachers):
        yield f"teachers are {config.teachers}; name at least one, and each once"
    size, parts, group = config.batch_size, config.accumulation, config.group
    if size % (parts * group):
        yield (
            f"batch_size {size} does not split into accumulation={parts} micro-batches of whole "
            f"groups of {group} clips; make it a multiple of {parts * group} or change group"
        )
    if model.hidden_size % model.num_heads:
        yield f"hidden_size {model.hidden_size} is not a multiple of num_heads {model.num_heads}"
    if model.remat not in ("none", "dots", "full"):
        yield f"model.remat is {model.remat!r}; it is none, dots or full"
    if (longest := objective.mixture_length[1]) > data.num_samples:
        clip = f"{data.num_samples} of a clip (data.num_samples)"
        yield f"objective.mixture_length reaches {longest} samples, more than the {clip}"
    if not 0 <= data.max_faulty <= 1:
        yield f"data.max_faulty is {data.max_faulty}; it is a share, 0 to 1"
    weights, count = tuple(data.weights), len(dataset_directories(config))
    positive = all(type(x) in (int, float) and 0 < x < math.inf for x in weights)
    if weights and count and not (len(weights) == count and positive):
        yield (
            f"data.weights are {len(weights)} {weights} for {count} datasets (data.dir "
            f"{data.dir!r}); give each dataset a number above 0, or () for all records alike"
        )


def dataset_directories(config: ConfigDict) -> list[str]:
    """Return the prepared datasets of `data.dir`."""
    return [name.strip() for name in config.data.dir.split(",") if name.strip()]


def _teacher_options(config: ConfigDict, name: str) -> dict[str, Any]:
    return {k: v for k, v in config.teacher.get(name, {}).items() if k != "weight"}


def find_stored_codes(config: ConfigDict) -> dict[str, CodesInfo]:
    """Return the codes of the config's teachers that all its datasets store, by teacher."""
    options = {name: _teacher_options(config, name) for name in config.teachers}
    checkpoints = {name: each.get("checkpoint", "") for name, each in options.items()}
    return loader.find_stored_codes(dataset_directories(config), checkpoints)


def open_datasets(config: ConfigDict, stored: Stored, split: str) -> list[Any]:
    """Open a split of each of the config's datasets. Raises UserError as `loader` does."""
    directories, data = dataset_directories(config), config.data
    if not directories:
        raise UserError("--config.data.dir=DIR is needed; make it by python -m mert_jax.prepare")
    return loader.open_datasets(directories, split, stored, data.num_samples, data.max_faulty)


def make_loader(
    config: ConfigDict, sources: Mapping[str, Sequence[Any]], mesh: Mesh, context: int
) -> Loader:
    """Return the loader of the config's batches, with `context` samples before each clip."""
    return Loader(
        sources,
        mesh,
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size // config.accumulation,
        num_samples=config.data.num_samples,
        context=context,
        weights=config.data.weights,
        seed=config.seed,
        max_faulty=config.data.max_faulty,
        threads=config.data.threads,
        workers=config.data.workers,
    )


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the config's mesh, of all devices by default. Raises UserError if it does not fit."""
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    return mesh


def make_teachers(config: ConfigDict, stored: Stored = NO_CODES) -> dict[str, Teacher]:
    """Return the teachers of `config.teachers` by name, in their order.

    One with `stored` codes needs no checkpoint. Raises UserError if it has that of another codec.
    """
    by_name = {}
    for name in config.teachers:
        options, info = _teacher_options(config, name), stored.get(name)
        if info and not options.get("checkpoint"):
            by_name[name] = Teacher(None, (), info.size)  # every batch has the codes
            continue
        teacher = by_name[name] = teachers.make(name, **options)
        if not info:
            continue
        if (fingerprint := teachers.fingerprint(teacher)) != info.fingerprint:
            checkpoint = options["checkpoint"]
            commands = " && ".join(
                f"python -m mert_jax.prepare --output={each} --codes={checkpoint}"
                for each in dataset_directories(config)
            )
            raise UserError(
                f"{config.data.dir} stores codes of another {name} (fingerprint "
                f"{info.fingerprint[:8]}, {checkpoint} has {fingerprint[:8]}); leave "
                f"teacher.{name}.checkpoint empty to use them, or store this one's: {commands}"
            )
        # stored codes were computed from whole tracks: they need no samples before the clip
        by_name[name] = teacher._replace(context=0)
    return by_name


def make_student(
    config: ConfigDict, teachers: Mapping[str, Teacher], stored: Stored = NO_CODES
) -> mert_v1.Student:
    """Return the student, with a head for each teacher."""
    heads = tuple(_head(config, name, x, stored.get(name)) for name, x in teachers.items())
    fields = dict(config.model) | {"dtype": jnp.dtype(config.model.dtype)}
    return mert_v1.Student(heads=heads, **fields)


def _head(config: ConfigDict, name: str, teacher: Teacher, info: CodesInfo | None) -> mert_v1.Head:
    special_codes = config.objective.special_codes
    if info:
        return mert_v1.Head(name, info.size + special_codes, info.books)
    wave = jax.ShapeDtypeStruct((1, config.data.num_samples), jnp.float32)
    target = jax.eval_shape(teacher.apply, teacher.params, wave)
    if jnp.issubdtype(target.dtype, jnp.integer):
        return mert_v1.Head(name, teacher.size + special_codes, target.shape[-1])
    return mert_v1.Head(name, teacher.size)


def make_objective(
    config: ConfigDict, student: mert_v1.Student, teachers: Mapping[str, Teacher]
) -> step.Objective:
    """Return the objective that the step minimises."""
    numbers, group = config.objective, config.group
    count, length = tuple(numbers.mixture_count), tuple(numbers.mixture_length)

    def apply_student(params, wave, mask, num_frames, key):
        variables, train = {"params": params}, key is not None
        rngs = {"dropout": key} if train else None
        return student.apply(
            variables, wave, mask, num_frames=num_frames, deterministic=not train, rngs=rngs
        )

    def draw_mask(keys, num_frames):
        valid, prob, span = jnp.full(keys.shape, num_frames), numbers.mask_prob, numbers.mask_length
        return masking.span_mask(
            keys, valid, num_frames, mask_prob=prob, mask_length=span, group=group
        )

    def mix_clips(keys, wave):
        if group < 2:  # no other clip to take noise from
            return wave
        num_samples, prob, volume = wave.shape[-1], numbers.mixture_prob, numbers.mixture_volume
        draws = mixture.draw(keys, num_samples, group, prob=prob, count=count, length=length)
        return mixture.mix(wave, draws, group=group, max_length=length[1], volume=volume)

    def targets_of(teacher):
        def apply(wave, params):  # without the frames of the context
            return teacher.apply(params, wave)[:, teacher.context // HOP_LENGTH :]

        def apply_on_shards(params, wave):
            # left to itself, XLA would move the clips of a long transform between devices
            return sharding.on_each_shard(apply, wave, params, differentiable=False)

        return apply_on_shards

    return step.Objective(
        student=apply_student,
        num_frames=student.num_frames,
        teachers={name: targets_of(teacher) for name, teacher in teachers.items()},
        context={name: teacher.context for name, teacher in teachers.items() if teacher.context},
        weights={name: config.teacher.get(name, {}).get("weight", 1.0) for name in teachers},
        mask=draw_mask,
        mixture=mix_clips,
        logit_temperature=numbers.logit_temperature,
        special_codes=numbers.special_codes,
        penalty_weight=numbers.features_penalty,
        unmasked_weight=numbers.unmasked_weight,
        codebooks_per_step=numbers.codebooks_per_step,
    )


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate of each update."""
    peak, warmup = config.optimizer.peak_learning_rate, config.optimizer.warmup_steps
    return optimizer.warmup_linear_decay(peak, warmup, config.total_steps)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Return the official optimiser with the config's numbers."""
    names = ("clip_norm", "b1", "b2", "eps", "weight_decay")
    return optimizer.make(make_schedule(config), **{name: config.optimizer[name] for name in names})


def init(
    config: ConfigDict, student: mert_v1.Student, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state of a new run; its parameters still have flax's logical axis names."""
    # parameters do not depend on the clip's length, so a short one is enough
    variables = student.init(jax.random.key(config.seed), jnp.zeros((1, 4000)))
    return step.begin(variables["params"], optimizer, config.guard.window)


class Experiment(NamedTuple):
    """The jitted steps of a config on a mesh, and what they take."""

    teachers: Mapping[str, Teacher]
    objective: step.Objective
    learning_rate: optax.Schedule  # of each update
    init: Callable[[], TrainState]  # the state of a new run, laid out by `shardings`
    abstract: TrainState  # its shapes
    shardings: TrainState
    train_step: Callable[..., Any]  # (state, teacher params, batch, key) -> (state, metrics)
    eval_step: Callable[..., Any]  # (params, teacher params, batch, key) -> step.Sums


def make_experiment(
    config: ConfigDict, student: mert_v1.Student, teachers: Mapping[str, Teacher], mesh: Mesh
) -> Experiment:
    """Return the experiment of a config, its student and teachers, compiling nothing yet."""
    objective, optimizer = make_objective(config, student, teachers), make_optimizer(config)
    init_with_axes = functools.partial(init, config, student, optimizer)
    shardings = sharding.state_shardings(init_with_axes, mesh)
    replicated = shardings.step

    def init_state() -> TrainState:
        return nn.unbox(init_with_axes())

    train_step = functools.partial(
        step.train_step,
        objective=objective,
        optimizer=optimizer,
        accumulation=config.accumulation,
        group=config.group,
        norm_factor=config.guard.factor,
    )
    eval_step = functools.partial(step.eval_step, objective=objective)
    return Experiment(
        teachers=teachers,
        objective=objective,
        learning_rate=make_schedule(config),
        # initialised in its final layout, so that no device ever holds all of it
        init=jax.jit(init_state, out_shardings=shardings),
        abstract=jax.eval_shape(init_state),
        shardings=shardings,
        # the new state takes the memory of the old one
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated)),
        eval_step=jax.jit(eval_step, out_shardings=replicated),
    )


class Settings(NamedTuple):
    """Numbers of a config that a run needs beside its updates; configs/base.py explains them."""

    seed: int
    intervals: Intervals
    directories: Sequence[str]
    update_seconds: float  # of audio
    update_flops: float  # of the model
    accept_changes: bool
    keep: int
    keep_every: int
    streak: int
    rollbacks: int
    watchdog_seconds: float
    tensorboard: bool


def make_settings(config: ConfigDict, student: mert_v1.Student) -> Settings:
    data, saves, guard = config.data, config.checkpoint, config.guard
    every = (config.log_every, config.eval_every, saves.every_steps, saves.every_minutes)
    return Settings(
        seed=config.seed,
        intervals=Intervals(config.total_steps, *every),
        directories=dataset_directories(config),
        update_seconds=_update_seconds(config),
        update_flops=3 * config.batch_size * student.flops(data.num_samples),
        accept_changes=data.accept_changes,
        keep=saves.keep,
        keep_every=saves.keep_every,
        streak=guard.streak,
        rollbacks=guard.rollbacks,
        watchdog_seconds=60 * config.watchdog_minutes,
        tensorboard=config.tensorboard,
    )


def _update_seconds(config: ConfigDict) -> float:
    return config.batch_size * config.data.num_samples / SAMPLE_RATE


def teacher_fingerprints(
    config: ConfigDict, by_name: Mapping[str, Teacher], stored: Stored
) -> dict[str, str]:
    """Return what identifies each teacher: its codebooks' hash, or the options of its features."""

    def identify(name: str, teacher: Teacher) -> str:
        if name in stored:
            return stored[name].fingerprint
        if _head(config, name, teacher, None).num_codebooks:
            return teachers.fingerprint(teacher)
        return json.dumps(_teacher_options(config, name), sort_keys=True)

    return {name: identify(name, teacher) for name, teacher in by_name.items()}


def read_initial_weights(
    config: ConfigDict, student: mert_v1.Student, fingerprints: Mapping[str, str]
) -> init_from.InitialWeights | None:
    """Read and report what the run takes over from `init_from`. Raises UserError if unsuitable."""
    if not config.init_from:
        return None
    checkpoint, special_codes = read_checkpoint(config.init_from), config.objective.special_codes
    initial = init_from.match_checkpoint(checkpoint, student, fingerprints, special_codes)
    peak, warmup = config.optimizer.peak_learning_rate, config.optimizer.warmup_steps
    rate = f"from 0 to {peak:g} in {warmup:,} updates, then to 0 at {config.total_steps:,}"
    lines = [f"weights from {config.init_from}", *initial.lines, f"learning rate: {rate}"]
    if initial.about.licence:
        lines.append(f"licence: {initial.about.licence} carries over")
    print(*lines, sep="\n  ", flush=True)
    return initial


def make_about(
    config: ConfigDict, fingerprints: Mapping[str, str], initial: init_from.InitialWeights | None
) -> About:
    """Return the description that this run's checkpoints carry."""
    inherited = initial.about if initial else About()
    return About(
        special_codes=config.objective.special_codes,
        teachers=dict(fingerprints),
        data=loader.dataset_summaries(dataset_directories(config), tuple(config.data.weights)),
        licence=inherited.licence,
        lineage=inherited.lineage,
    )


def describe(config: ConfigDict, student: mert_v1.Student, table: bool) -> str:
    """Return the size of the student and of a batch; with `table`, every parameter first."""
    from clu import parameter_overview  # slow to import

    params, seconds = tensor_names.abstract_params(student), _update_seconds(config)
    count = sum(x.size for x in params.values())
    line = (
        f"parameters: {count:,}  (width {student.hidden_size}, {student.num_layers} layers); "
        f"{config.batch_size} clips = {seconds:,.0f} s ({seconds / 3600:.2f} h) of audio an update"
    )
    if not table:
        return line
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    return f"{overview}\n{line}"
