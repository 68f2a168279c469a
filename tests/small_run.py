"""Music and the parts of a small training run in the current process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mert_jax.constants import SAMPLE_RATE
from mert_jax.pretraining import build, metrics, step
from tests import small

SAMPLES = 16_000


def music(clips, seed=0):
    """Return int16 [clips, N]: a few decaying partials each, which a student can learn."""
    rng = np.random.default_rng(seed)
    t = np.arange(SAMPLES) / SAMPLE_RATE
    f = rng.uniform(80, 2000, (clips, 4, 1))
    wave = (np.sin(2 * np.pi * f * t) * np.exp(-3 * t)).sum(1) + 0.01 * rng.normal(
        size=(clips, SAMPLES)
    )
    return jnp.asarray(np.round(5000 * wave), jnp.int16)


class Run:
    """The parts of a training run on one device."""

    def __init__(self, **overrides):
        self.config = build.check(small.config(**overrides))
        teachers = build.make_teachers(self.config)
        self.student = build.make_student(self.config, teachers)
        self.objective = build.make_objective(self.config, self.student, teachers)
        self.teacher_params = {name: t.params for name, t in teachers.items()}
        self.optimizer = build.make_optimizer(self.config)
        self.key = jax.random.key(self.config.seed)

    @functools.cached_property
    def init(self):
        return jax.jit(lambda: nn.unbox(build.init(self.config, self.student, self.optimizer)))

    @functools.cached_property
    def step(self):
        return jax.jit(
            functools.partial(
                step.train_step,
                objective=self.objective,
                optimizer=self.optimizer,
                accumulation=self.config.accumulation,
                group=self.config.group,
            )
        )

    @functools.cached_property
    def evaluate(self):
        return jax.jit(functools.partial(step.eval_step, objective=self.objective))

    def train(self, steps, audio):
        state, rows = self.init(), []
        batch = {"audio": audio, "looped": jnp.zeros(audio.shape[0], bool)}
        for _ in range(steps):
            state, result = self.step(state, self.teacher_params, batch, self.key)
            rows.append(metrics.to_row(result["sums"]))
        return state, rows
