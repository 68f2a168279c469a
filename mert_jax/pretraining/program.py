"""What a recipe compiles to on a mesh: `train` runs it, `plan` looks at it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.models import mert_v1
from mert_jax.pretraining import build, step
from mert_jax.teachers.teacher import Teacher


class Program(NamedTuple):
    """init: () -> the state of a new run; abstract, shardings: its shapes and layout; context:
    samples before a clip that teachers hear; train_step, eval_step: as in `step`, jitted."""

    init: Callable[[], TrainState]
    abstract: TrainState
    shardings: TrainState
    context: int
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]


def make(
    config: ConfigDict, student: mert_v1.Student, teachers: Mapping[str, Teacher], mesh: Mesh
) -> Program:
    """The program of a config, its student and teachers; nothing is compiled yet."""
    optimizer = build.make_optimizer(config)
    boxed = functools.partial(build.init, config, student, optimizer)
    init = lambda: nn.unbox(boxed())
    shardings = sharding.state_shardings(boxed, mesh)
    objective = build.objective(config, student, dict(teachers))
    compiled = step.compiled(
        objective, optimizer, config.accumulation, config.group, config.guard.factor, shardings
    )
    # sharded from birth: no device ever holds all of it
    born = jax.jit(init, out_shardings=shardings)
    context = max(objective.context.values(), default=0)
    return Program(born, jax.eval_shape(init), shardings, context, *compiled)
