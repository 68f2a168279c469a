"""Turns a config into an experiment: student, teachers, objective, optimiser, compiled steps.

No other module of a run reads the config; all others take numbers, arrays and functions.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mert_jax import sharding, teachers
from mert_jax.checkpoints import init_from
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.checkpoints.in_memory import About
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import loader
from mert_jax.data.loader import Loader
from mert_jax.data.stored_codes import CodesInfo
from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.pretraining import masking, mixture, optimizer, step
from mert_jax.pretraining.loop import Intervals
from mert_jax.teachers.teacher import Teacher


def check(config: ConfigDict | None) -> ConfigDict:
    """Return `config`. Raises UserError if its numbers do not go together."""
    if config is None:
        raise UserError("--config=FILE is needed, such as --config=configs/tiny.py")
    if config.objective.codebooks_per_step < 0:
        raise UserError(
            f"objective.codebooks_per_step is {config.objective.codebooks_per_step}; 0 means all"
        )
    for key in ("total_steps", "batch_size", "accumulation", "group", "log_every", "eval_every"):
        if config[key] < 1:
            raise UserError(f"{key} is {config[key]}; it must be at least 1")
    if not config.teachers or len(set(config.teachers)) < len(config.teachers):
        raise UserError(f"teachers are {config.teachers}; name at least one, and each once")
    micro_batch, rest = divmod(config.batch_size, config.accumulation)
    if rest or micro_batch % config.group:
        raise UserError(
            f"batch_size {config.batch_size} does not split into accumulation="
            f"{config.accumulation} micro-batches of whole groups of {config.group} clips; make it "
            f"a multiple of {config.accumulation * config.group} or change group"
        )
    if config.model.hidden_size % config.model.num_heads:
        raise UserError(
            f"hidden_size {config.model.hidden_size} is not a multiple of num_heads "
            f"{config.model.num_heads}"
        )
    if config.model.remat not in ("none", "dots", "full"):
        raise UserError(f"model.remat is {config.model.remat!r}; it is none, dots or full")
    longest = config.objective.mixture_length[1]
    if longest > config.data.num_samples:
        raise UserError(
            f"objective.mixture_length reaches {longest} samples, more than the "
            f"{config.data.num_samples} of a clip (data.num_samples)"
        )
    if not 0 <= config.data.max_faulty <= 1:
        raise UserError(f"data.max_faulty is {config.data.max_faulty}; it is a share, 0 to 1")
    weights, count = tuple(config.data.weights), len(dataset_directories(config))
    positive = all(type(x) in (int, float) and 0 < x < math.inf for x in weights)
    if weights and count and not (len(weights) == count and positive):
        raise UserError(
            f"data.weights are {len(weights)} {weights} for {count} datasets (data.dir "
            f"{config.data.dir!r}); give each dataset a number above 0, or () for all records alike"
        )
    return config


def dataset_directories(config: ConfigDict) -> list[str]:
    """Return the prepared datasets of `data.dir`."""
    return [name.strip() for name in config.data.dir.split(",") if name.strip()]


def teacher_options(config: ConfigDict, name: str) -> dict[str, Any]:
    """Return the options that a teacher is made with."""
    return {k: v for k, v in config.teacher.get(name, {}).items() if k != "weight"}


def find_stored_codes(config: ConfigDict) -> dict[str, CodesInfo]:
    """Return the codes of the config's teachers that all its datasets store, by teacher."""
    checkpoints = {
        name: teacher_options(config, name).get("checkpoint", "") for name in config.teachers
    }
    return loader.find_stored_codes(dataset_directories(config), checkpoints)


def open_datasets(config: ConfigDict, stored: Mapping[str, CodesInfo], split: str) -> list[Any]:
    """Open a split of each of the config's datasets. Raises UserError as `loader` does."""
    directories, data = dataset_directories(config), config.data
    if not directories:
        raise UserError(
            "--config.data.dir=DIR is needed: a folder made by python -m mert_jax.prepare"
        )
    return loader.open_datasets(directories, split, stored, data.num_samples, data.max_faulty)


def make_loader(
    config: ConfigDict, sources: Mapping[str, Sequence[Any]], mesh: Mesh, context: int
) -> Loader:
    """Return the loader of the config's batches, with `context` samples before each clip."""
    data, size = config.data, config.batch_size
    clip = dict(num_samples=data.num_samples, context=context)
    reading = dict(weights=data.weights, threads=data.threads, workers=data.workers)
    reading["seed"] = config.seed
    return Loader(sources, mesh, size, size // config.accumulation, data.max_faulty, clip, reading)


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the config's mesh, of all devices by default.

    Raises UserError if the devices or a micro-batch cannot be split so.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    return mesh


def make_teachers(
    config: ConfigDict, stored: Mapping[str, CodesInfo] | None = None
) -> dict[str, Teacher]:
    """Return the teachers of `config.teachers` by name, in their order.

    A teacher with `stored` codes needs no checkpoint. Raises UserError if it has one that is not
    of the codec that made the codes.
    """
    by_name = {}
    for name in config.teachers:
        options, info = teacher_options(config, name), (stored or {}).get(name)
        if not info:
            by_name[name] = teachers.make(name, **options)
        elif not options.get("checkpoint"):
            by_name[name] = Teacher(None, (), info.size)  # every batch has the codes
        else:
            teacher = teachers.make(name, **options)
            if (fingerprint := teachers.fingerprint(teacher)) != info.fingerprint:
                commands = " && ".join(
                    f"python -m mert_jax.prepare --output={each} --codes={options['checkpoint']}"
                    for each in dataset_directories(config)
                )
                raise UserError(
                    f"{config.data.dir} stores codes of another {name} (fingerprint "
                    f"{info.fingerprint[:8]}, {options['checkpoint']} has {fingerprint[:8]}); "
                    f"leave teacher.{name}.checkpoint empty to use them, or store this one's: "
                    f"{commands}"
                )
            # stored codes were computed from whole tracks: they need no samples before the clip
            by_name[name] = teacher._replace(context=0)
    return by_name


def student(
    config: ConfigDict,
    teachers: Mapping[str, Teacher],
    stored: Mapping[str, CodesInfo] | None = None,
) -> mert_v1.Student:
    """Return the student, with a head for each teacher."""
    heads = []
    for name, teacher in teachers.items():
        if info := (stored or {}).get(name):
            heads.append(mert_v1.Head(name, info.size + config.objective.special_codes, info.books))
            continue
        wave = jax.ShapeDtypeStruct((1, config.data.num_samples), jnp.float32)
        target = jax.eval_shape(teacher.apply, teacher.params, wave)
        if jnp.issubdtype(target.dtype, jnp.integer):
            classes = teacher.size + config.objective.special_codes
            heads.append(mert_v1.Head(name, classes, target.shape[-1]))
        else:
            heads.append(mert_v1.Head(name, teacher.size))
    options = dict(config.model)
    return mert_v1.Student(heads=tuple(heads), **options | {"dtype": jnp.dtype(options["dtype"])})


def objective(
    config: ConfigDict, student: mert_v1.Student, teachers: Mapping[str, Teacher]
) -> step.Objective:
    """Return the objective that the step minimises."""
    numbers, group = config.objective, config.group

    def apply_student(params, wave, mask, num_frames, key):
        rngs = None if key is None else {"dropout": key}
        variables = {"params": params}
        return student.apply(
            variables, wave, mask, num_frames=num_frames, deterministic=key is None, rngs=rngs
        )

    def mask(keys, length):
        frames = jnp.full(keys.shape, length)
        probabilities = dict(mask_prob=numbers.mask_prob, mask_length=numbers.mask_length)
        return masking.span_mask(keys, frames, length, group=group, **probabilities)

    def mix_clips(keys, wave):
        if group < 2:
            return wave
        count, length = tuple(numbers.mixture_count), tuple(numbers.mixture_length)
        prob, samples = numbers.mixture_prob, wave.shape[-1]
        draws = mixture.draw(keys, samples, group, prob=prob, count=count, length=length)
        return mixture.mix(
            wave, draws, group=group, max_length=length[1], volume=numbers.mixture_volume
        )

    def targets_of(teacher):
        def apply(wave, params):
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
        mask=mask,
        mixture=mix_clips,
        logit_temperature=numbers.logit_temperature,
        special_codes=numbers.special_codes,
        penalty=numbers.features_penalty,
        unmasked_weight=numbers.unmasked_weight,
        codebooks_per_step=numbers.codebooks_per_step,
    )


def schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate of each update."""
    numbers = config.optimizer
    return optimizer.warmup_linear_decay(
        numbers.peak_learning_rate, numbers.warmup_steps, config.total_steps
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Return the official optimiser with the config's numbers."""
    names = ("clip_norm", "b1", "b2", "eps", "weight_decay")
    return optimizer.make(schedule(config), **{name: config.optimizer[name] for name in names})


def init(
    config: ConfigDict, student: mert_v1.Student, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state of a new run; its parameters still have flax's logical axis names."""
    params = init_params(student, config.seed)
    return step.begin(params, optimizer, config.guard.window)


def init_params(student: mert_v1.Student, seed: int) -> Any:
    """Return new parameters, with flax's logical axis names."""
    # parameters do not depend on the clip's length, so a short one is enough
    return student.init(jax.random.key(seed), jnp.zeros((1, 4000)))["params"]


class Experiment(NamedTuple):
    """Everything that a config specifies about the updates of a run, on a mesh.

    learning_rate: rate of each update
    init: () -> state of a new run, laid out by `shardings`
    abstract: shapes of the state
    train_step, eval_step: as in `step`, jitted
    """

    student: mert_v1.Student
    teachers: Mapping[str, Teacher]
    objective: step.Objective
    learning_rate: optax.Schedule
    init: Callable[[], TrainState]
    abstract: TrainState
    shardings: TrainState
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    @property
    def context(self) -> int:
        """Samples before each clip that teachers hear."""
        return self.objective.longest_context


def make_experiment(
    config: ConfigDict, student: mert_v1.Student, teachers: Mapping[str, Teacher], mesh: Mesh
) -> Experiment:
    """Return the experiment of a config, its student and teachers, compiling nothing yet."""
    optimizer = make_optimizer(config)

    def begin() -> TrainState:
        return init(config, student, optimizer)

    def begin_unboxed() -> TrainState:
        return nn.unbox(begin())

    shardings = sharding.state_shardings(begin, mesh)
    minimised = objective(config, student, teachers)
    accumulation, group, factor = config.accumulation, config.group, config.guard.factor
    return Experiment(
        student,
        teachers,
        minimised,
        schedule(config),
        # initialised in its final layout, so that no device ever holds all of it
        jax.jit(begin_unboxed, out_shardings=shardings),
        jax.eval_shape(begin_unboxed),
        shardings,
        *step.compiled(minimised, optimizer, accumulation, group, factor, shardings),
    )


class Settings(NamedTuple):
    """The numbers of a config that a run needs around its updates.

    update_seconds: seconds of audio an update
    update_flops: model FLOPs an update
    """

    seed: int
    intervals: Intervals
    directories: Sequence[str]
    update_seconds: float
    update_flops: float
    max_faulty: float
    accept_changes: bool
    keep: int
    keep_every: int
    streak: int
    rollbacks: int
    watchdog_seconds: float
    tensorboard: bool


def settings(config: ConfigDict, student: mert_v1.Student) -> Settings:
    """Return the settings of a run."""
    data, saves, guard = config.data, config.checkpoint, config.guard
    return Settings(
        seed=config.seed,
        intervals=Intervals(
            config.total_steps,
            config.log_every,
            config.eval_every,
            saves.every_steps,
            saves.every_minutes,
        ),
        directories=dataset_directories(config),
        update_seconds=config.batch_size * data.num_samples / SAMPLE_RATE,
        update_flops=3 * config.batch_size * student.flops(data.num_samples),
        max_faulty=data.max_faulty,
        accept_changes=data.accept_changes,
        keep=saves.keep,
        keep_every=saves.keep_every,
        streak=guard.streak,
        rollbacks=guard.rollbacks,
        watchdog_seconds=60 * config.watchdog_minutes,
        tensorboard=config.tensorboard,
    )


def fingerprints(
    config: ConfigDict, experiment_teachers: Mapping[str, Teacher], stored: Mapping[str, CodesInfo]
) -> dict[str, str]:
    """Return what identifies each teacher: its codebooks' hash, or the options of its features."""
    by_name = {}
    for name, teacher in experiment_teachers.items():
        if name in stored:
            by_name[name] = stored[name].fingerprint
        elif any(head.num_codebooks for head in student(config, {name: teacher}).heads):
            by_name[name] = teachers.fingerprint(teacher)
        else:
            by_name[name] = json.dumps(teacher_options(config, name), sort_keys=True)
    return by_name


def read_initial_weights(
    config: ConfigDict, student: mert_v1.Student, fingerprints: Mapping[str, str]
) -> init_from.InitialWeights | None:
    """Read and report what the run takes over from `init_from`, None without it.

    Raises UserError if that is not a checkpoint, or one of another student.
    """
    if not config.init_from:
        return None
    checkpoint, special_codes = read_checkpoint(config.init_from), config.objective.special_codes
    initial = init_from.match_checkpoint(checkpoint, student, fingerprints, special_codes)
    peak, warmup = config.optimizer.peak_learning_rate, config.optimizer.warmup_steps
    print(
        f"weights from {config.init_from}",
        *initial.lines,
        f"learning rate: from 0 to {peak:g} in {warmup:,} updates, then to 0 at "
        f"{config.total_steps:,}",
        *([f"licence: {initial.about.licence} carries over"] if initial.about.licence else []),
        sep="\n  ",
        flush=True,
    )
    return initial


def about(
    config: ConfigDict,
    fingerprints: Mapping[str, str],
    initial: init_from.InitialWeights | None,
) -> About:
    """Return the description that this run's checkpoints carry."""
    return About(
        special_codes=config.objective.special_codes,
        teachers=dict(fingerprints),
        data=loader.dataset_summaries(dataset_directories(config), tuple(config.data.weights)),
        licence=initial.about.licence if initial else "",
        lineage=initial.about.lineage if initial else (),
    )


def describe(config: ConfigDict, student: mert_v1.Student, table: bool) -> str:
    """Return the size of the student and of a batch; with `table`, every parameter first."""
    from clu import parameter_overview  # slow to import

    params = jax.eval_shape(lambda: nn.unbox(init_params(student, 0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    seconds = config.batch_size * config.data.num_samples / SAMPLE_RATE
    line = (
        f"parameters: {count:,}  (width {student.hidden_size}, {student.num_layers} layers); "
        f"{config.batch_size} clips = {seconds:,.0f} s ({seconds / 3600:.2f} h) of audio an update"
    )
    if not table:
        return line
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    return f"{overview}\n{line}"
