"""From a config to student, teachers, objective, optimiser and compiled steps."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mert_jax import sharding, teachers
from mert_jax.checkpoints import in_memory, init_from
from mert_jax.checkpoints.reading import read_checkpoint
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import code_checks, stored_codes
from mert_jax.data import mix as datasets
from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.pretraining import masking, mixture, optimizer, step
from mert_jax.teachers.teacher import Teacher


def check(config: ConfigDict | None) -> ConfigDict:
    """`config` itself, if its numbers go together; UserError otherwise."""
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
            f"hidden_size {config.model.hidden_size} is no multiple of num_heads "
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
    weights, count = tuple(config.data.weights), len(datasets.dataset_directories(config))
    positive = (type(x) in (int, float) and 0 < x < math.inf for x in weights)
    if weights and count and not (len(weights) == count and all(positive)):
        raise UserError(
            f"data.weights are {len(weights)} {weights} for {count} datasets (data.dir "
            f"{config.data.dir!r}); give each dataset a number above 0, or () for all records alike"
        )
    return config


def make_teachers(
    config: ConfigDict, stored: Mapping[str, stored_codes.CodesInfo] | None = None
) -> dict[str, Teacher]:
    """The teachers of `config.teachers`, by name, in their order.

    One whose codes are stored needs no checkpoint; one that has a checkpoint must be the one that
    made them, else UserError.
    """
    made = {}
    for name in config.teachers:
        options = dict(config.teacher.get(name, {}))
        options.pop("weight", None)
        info = (stored or {}).get(name)
        if info and not options.get("checkpoint"):
            made[name] = stored_codes.stored_teacher(info)
            continue
        made[name] = teachers.make(name, **options)
        if info and (now := teachers.fingerprint(made[name])) != info.fingerprint:
            store = [
                f"python -m mert_jax.prepare --output={directory} --codes={options['checkpoint']}"
                for directory in datasets.dataset_directories(config)
            ]
            raise UserError(
                f"{config.data.dir} stores codes of another {name} (fingerprint "
                f"{info.fingerprint[:8]}, {options['checkpoint']} has {now[:8]}); leave "
                f"teacher.{name}.checkpoint empty to use them, or store this one's: "
                f"{' && '.join(store)}"
            )
        if info:  # codes of whole tracks have heard all there is
            made[name] = made[name]._replace(context=0)
    return made


def student(
    config: ConfigDict,
    made: Mapping[str, Teacher],
    stored: Mapping[str, stored_codes.CodesInfo] | None = None,
) -> mert_v1.Student:
    """The student, with a head for each teacher."""
    heads = []
    for name, teacher in made.items():
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


def context(made: Mapping[str, Teacher]) -> dict[str, int]:
    """Samples before a clip that teachers hear, by name, of those that hear any."""
    return {name: teacher.context for name, teacher in made.items() if teacher.context}


def check_labels(config: ConfigDict, sums: step.Sums, directory: str) -> list[str]:
    """A line on the codes of each acoustic teacher in a batch of a dataset's validation split.

    Raises UserError with the numbers when they are degenerate or outside their codebooks.
    """
    lines = []
    for name, found in sums.codes.items():
        counts = np.asarray(found.targets)[:, config.objective.special_codes :]
        lines.append(
            code_checks.check_codes(f"labels of {name} in {directory}", counts, int(sums.frames))
        )
    return lines


def objective(
    config: ConfigDict, student: mert_v1.Student, made: dict[str, Teacher]
) -> step.Objective:
    """What the step minimises."""
    o, group = config.objective, config.group

    def apply_student(params, wave, mask, num_frames, key):
        rngs = None if key is None else {"dropout": key}
        variables = {"params": params}
        return student.apply(
            variables, wave, mask, num_frames=num_frames, deterministic=key is None, rngs=rngs
        )

    def mask(keys, length):
        frames = jnp.full(keys.shape, length)
        probabilities = dict(mask_prob=o.mask_prob, mask_length=o.mask_length)
        return masking.span_mask(keys, frames, length, group=group, **probabilities)

    def mix(keys, wave):
        if group < 2:
            return wave
        draws = mixture.draw(
            keys,
            wave.shape[-1],
            group,
            prob=o.mixture_prob,
            count=tuple(o.mixture_count),
            length=tuple(o.mixture_length),
        )
        longest = o.mixture_length[1]
        return mixture.mix(wave, draws, group=group, max_length=longest, volume=o.mixture_volume)

    def heard(teacher):
        def apply(wave, params):
            return teacher.apply(params, wave)[:, teacher.context // HOP_LENGTH :]

        # not left to XLA, which would move the clips of a long transform between devices
        return lambda params, wave: sharding.on_each_shard(
            apply, wave, params, differentiable=False
        )

    return step.Objective(
        student=apply_student,
        num_frames=student.num_frames,
        teachers={name: heard(teacher) for name, teacher in made.items()},
        context=context(made),
        weights={name: config.teacher.get(name, {}).get("weight", 1.0) for name in made},
        mask=mask,
        mixture=mix,
        logit_temperature=o.logit_temperature,
        special_codes=o.special_codes,
        penalty=o.features_penalty,
        unmasked_weight=o.unmasked_weight,
        codebooks_per_step=o.codebooks_per_step,
    )


def schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate of each update."""
    o = config.optimizer
    return optimizer.warmup_linear_decay(o.peak_learning_rate, o.warmup_steps, config.total_steps)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The official optimiser with the config's numbers."""
    o = config.optimizer
    return optimizer.make(
        schedule(config),
        clip_norm=o.clip_norm,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
    )


def init(
    config: ConfigDict, student: mert_v1.Student, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state of a new run, with flax's logical axis names still on its parameters."""
    # parameters do not depend on the clip's length, so the shortest will do
    wave = jnp.zeros((1, 4000))
    params = student.init(jax.random.key(config.seed), wave)["params"]
    return step.begin(params, optimizer, config.guard.window)


def fingerprints(
    config: ConfigDict,
    made: Mapping[str, Teacher],
    stored: Mapping[str, stored_codes.CodesInfo],
) -> dict[str, str]:
    """What tells each teacher from others of its name: its codebooks, or what features it makes."""
    found = {}
    for name, teacher in made.items():
        if name in stored:
            found[name] = stored[name].fingerprint
        elif any(head.num_codebooks for head in student(config, {name: teacher}).heads):
            found[name] = teachers.fingerprint(teacher)
        else:
            options = {k: v for k, v in config.teacher.get(name, {}).items() if k != "weight"}
            found[name] = json.dumps(options, sort_keys=True)
    return found


def read_start(
    config: ConfigDict, student: mert_v1.Student, fingerprints: Mapping[str, str]
) -> init_from.InitialWeights | None:
    """What a run takes over from `init_from`, None where it begins from nothing.

    Raises UserError where that is no checkpoint or of another student.
    """
    if not config.init_from:
        return None
    found = read_checkpoint(config.init_from)
    start = init_from.match_checkpoint(found, student, fingerprints, config.objective.special_codes)
    o = config.optimizer
    print(
        f"weights from {config.init_from}",
        *start.lines,
        f"learning rate: from 0 to {o.peak_learning_rate:g} in {o.warmup_steps:,} updates, then to "
        f"0 at {config.total_steps:,}",
        *([f"licence: {start.about.licence} carries over"] if start.about.licence else []),
        sep="\n  ",
        flush=True,
    )
    return start


def about(
    config: ConfigDict, fingerprints: Mapping[str, str], start: init_from.InitialWeights | None
) -> in_memory.About:
    """What this run's checkpoints will say of themselves."""
    return in_memory.About(
        special_codes=config.objective.special_codes,
        teachers=dict(fingerprints),
        data=datasets.dataset_summaries(config),
        licence=start.about.licence if start else "",
        lineage=start.about.lineage if start else (),
    )


def describe(config: ConfigDict, student: mert_v1.Student, table: bool) -> str:
    """The number of parameters, computed without making any; with `table`, each of them."""
    from clu import parameter_overview

    params = jax.eval_shape(lambda: nn.unbox(student.init(jax.random.key(0), jnp.zeros((1, 4000)))))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    seconds = config.batch_size * config.data.num_samples / SAMPLE_RATE
    line = (
        f"parameters: {count:,}  (width {student.hidden_size}, {student.num_layers} layers); "
        f"{config.batch_size} clips = {seconds:,.0f} s ({seconds / 3600:.2f} h) of audio an update"
    )
    if not table:
        return line
    overview = parameter_overview.get_parameter_overview(params["params"], include_stats=False)
    return f"{overview}\n{line}"


class Experiment(NamedTuple):
    """The functions and layouts that a config comes to on a mesh.

    init: () -> the state of a new run; abstract, shardings: its shapes and layout; context: samples
    before each clip that teachers hear; train_step, eval_step: as in `step`, jitted.
    """

    init: Callable[[], TrainState]
    abstract: TrainState
    shardings: TrainState
    context: int
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]


def make_experiment(
    config: ConfigDict, student: mert_v1.Student, teachers: Mapping[str, Teacher], mesh: Mesh
) -> Experiment:
    """Return the experiment of a config, its student and teachers, compiling nothing yet."""
    optimizer = make_optimizer(config)
    boxed = functools.partial(init, config, student, optimizer)

    def unboxed() -> TrainState:
        return nn.unbox(boxed())

    shardings = sharding.state_shardings(boxed, mesh)
    minimised = objective(config, student, dict(teachers))
    compiled = step.compiled(
        minimised, optimizer, config.accumulation, config.group, config.guard.factor, shardings
    )
    # initialised where it will lie: no device ever holds all of it
    sharded = jax.jit(unboxed, out_shardings=shardings)
    context = max(minimised.context.values(), default=0)
    return Experiment(sharded, jax.eval_shape(unboxed), shardings, context, *compiled)
