"""From a config to the things a run is made of; the one place that reads it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mert_jax import cli, codes, labels, masking, mixture, model, optimizer, records, step, teachers


def check(config: ConfigDict | None) -> ConfigDict:
    """`config` itself, if its numbers go together; UserError otherwise."""
    if config is None:
        raise cli.UserError("--config=FILE is needed, such as --config=configs/tiny.py")
    if config.objective.codebooks_per_step < 0:
        raise cli.UserError(
            f"objective.codebooks_per_step is {config.objective.codebooks_per_step}; 0 means all"
        )
    for key in ("total_steps", "batch_size", "accumulation", "group", "log_every", "eval_every"):
        if config[key] < 1:
            raise cli.UserError(f"{key} is {config[key]}; it must be at least 1")
    if not config.teachers or len(set(config.teachers)) < len(config.teachers):
        raise cli.UserError(f"teachers are {config.teachers}; name at least one, and each once")
    micro_batch, rest = divmod(config.batch_size, config.accumulation)
    if rest or micro_batch % config.group:
        raise cli.UserError(
            f"batch_size {config.batch_size} does not split into accumulation="
            f"{config.accumulation} micro-batches of whole groups of {config.group} clips; make it "
            f"a multiple of {config.accumulation * config.group} or change group"
        )
    if config.model.hidden_size % config.model.num_heads:
        raise cli.UserError(
            f"hidden_size {config.model.hidden_size} is no multiple of num_heads "
            f"{config.model.num_heads}"
        )
    if config.model.remat not in ("none", "dots", "full"):
        raise cli.UserError(f"model.remat is {config.model.remat!r}; it is none, dots or full")
    longest = config.objective.mixture_length[1]
    if longest > config.data.num_samples:
        raise cli.UserError(
            f"objective.mixture_length reaches {longest} samples, more than the "
            f"{config.data.num_samples} of a clip (data.num_samples)"
        )
    weights, count = tuple(config.data.weights), len(directories(config))
    positive = (type(x) in (int, float) and 0 < x < math.inf for x in weights)
    if weights and not (len(weights) == count and all(positive)):
        raise cli.UserError(
            f"data.weights are {len(weights)} {weights} for {count} datasets (data.dir "
            f"{config.data.dir!r}); give each dataset a number above 0, or () for all records alike"
        )
    return config


def directories(config: ConfigDict) -> list[str]:
    """The prepared datasets of `data.dir`."""
    return [name.strip() for name in config.data.dir.split(",") if name.strip()]


def stored_codes(config: ConfigDict) -> dict[str, codes.Info]:
    """What every dataset stores alike of the config's teachers, by name, as the first says it.

    Where datasets differ, a teacher with a checkpoint computes its codes instead, and a line is
    printed; UserError for one without.
    """
    stored = {}
    for name in config.teachers:
        found = {directory: codes.info(directory, name) for directory in directories(config)}
        first = next((directory for directory, info in found.items() if info), None)
        if not first:
            continue
        codec = found[first].codec
        others = [d for d, info in found.items() if not info or info.codec != codec]
        if not others:
            stored[name] = found[first]
            continue
        said = f"{others[0]} does not store the codes of {name} that {first} does"
        if not config.teacher.get(name, {}).get("checkpoint"):
            raise cli.UserError(
                f"{said}; run python -m mert_jax.prepare --output={others[0]} --codes=CHECKPOINT "
                f"with the same codec, or set teacher.{name}.checkpoint to compute them"
            )
        print(f"{said}: they are computed for every dataset", flush=True)
    return stored


def open_datasets(config: ConfigDict, split: str, stored: dict[str, codes.Info]) -> list[Any]:
    """The records of each prepared dataset, with the codes it has `stored`; UserError when the
    clips asked for cannot be cut from it."""
    if not directories(config):
        raise cli.UserError(
            "--config.data.dir=DIR is needed: a folder made by python -m mert_jax.prepare"
        )
    sources = []
    for directory in directories(config):
        overlap = records.metadata(directory)["overlap_samples"]
        if config.data.num_samples > overlap:
            raise cli.UserError(
                f"clips of {config.data.num_samples} samples (data.num_samples) are longer than "
                f"the {overlap} that {directory} was prepared for; prepare it again with "
                f"--crop_seconds={config.data.num_samples / records.SAMPLE_RATE:g}"
            )
        own = {name: codes.info(directory, name) for name in stored}
        sources.append(codes.attach(records.open_source(directory, split), directory, split, own))
    return sources


def make_teachers(
    config: ConfigDict, stored: Mapping[str, codes.Info] | None = None
) -> dict[str, teachers.Teacher]:
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
            made[name] = codes.teacher(info)
            continue
        made[name] = teachers.make(name, **options)
        if info and (now := teachers.fingerprint(made[name])) != info.fingerprint:
            store = [
                f"python -m mert_jax.prepare --output={directory} --codes={options['checkpoint']}"
                for directory in directories(config)
            ]
            raise cli.UserError(
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
    made: Mapping[str, teachers.Teacher],
    stored: Mapping[str, codes.Info] | None = None,
) -> model.Student:
    """The student, with a head for each teacher."""
    heads = []
    for name, teacher in made.items():
        if info := (stored or {}).get(name):
            heads.append(model.Head(name, info.size + config.objective.special_codes, info.books))
            continue
        wave = jax.ShapeDtypeStruct((1, config.data.num_samples), jnp.float32)
        target = jax.eval_shape(teacher.apply, teacher.params, wave)
        if jnp.issubdtype(target.dtype, jnp.integer):
            classes = teacher.size + config.objective.special_codes
            heads.append(model.Head(name, classes, target.shape[-1]))
        else:
            heads.append(model.Head(name, teacher.size))
    options = dict(config.model)
    return model.Student(heads=tuple(heads), **options | {"dtype": jnp.dtype(options["dtype"])})


def context(made: Mapping[str, teachers.Teacher]) -> dict[str, int]:
    """Samples before a clip that teachers hear, by name, of those that hear any."""
    return {name: teacher.context for name, teacher in made.items() if teacher.context}


def check_labels(config: ConfigDict, sums: step.Sums, directory: str) -> list[str]:
    """A line on the codes of each acoustic teacher in a batch of a dataset's validation split.

    Raises UserError with the numbers when they are degenerate or outside their codebooks.
    """
    lines = []
    for name, found in sums.codes.items():
        counts = np.asarray(found.targets)[:, config.objective.special_codes :]
        lines.append(labels.check(f"labels of {name} in {directory}", counts, int(sums.frames)))
    return lines


def objective(
    config: ConfigDict, student: model.Student, made: dict[str, teachers.Teacher]
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
        if not teacher.context:
            return teacher.apply
        frames = teacher.context // records.HOP_LENGTH
        return lambda params, wave: teacher.apply(params, wave)[:, frames:]

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
    config: ConfigDict, student: model.Student, optimizer: optax.GradientTransformation
) -> step.TrainState:
    """The state of a new run, with flax's logical axis names still on its parameters."""
    # parameters do not depend on the clip's length, so the shortest will do
    wave = jnp.zeros((1, 4000))
    params = student.init(jax.random.key(config.seed), wave)["params"]
    return step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def describe(config: ConfigDict, student: model.Student, table: bool) -> str:
    """The number of parameters, computed without making any; with `table`, each of them."""
    from clu import parameter_overview
    from flax import linen as nn

    params = jax.eval_shape(lambda: nn.unbox(student.init(jax.random.key(0), jnp.zeros((1, 4000)))))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    seconds = config.batch_size * config.data.num_samples / records.SAMPLE_RATE
    line = (
        f"parameters: {count:,}  (width {student.hidden_size}, {student.num_layers} layers); "
        f"{config.batch_size} clips = {seconds:,.0f} s ({seconds / 3600:.2f} h) of audio an update"
    )
    if not table:
        return line
    overview = parameter_overview.get_parameter_overview(params["params"], include_stats=False)
    return f"{overview}\n{line}"
