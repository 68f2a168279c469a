"""The cost of the teachers, compared with a complete training step, on the CPU.

Rows `teachers_SIZE_NAME` of `tiny` (configs/tiny.py, 16 clips of 1 s) and `95m` (configs/base.py in
float32, 4 clips of 5 s). ours_s is the time of the teacher, or of the teachers joined by "+", for
the clips of a step. The peer is the training step with only those teachers, so the teacher's share
of the step is 1 / ratio. ours_mib and peer_mib are the temporary memory that the compiler plans for
each.

python -m tests.benchmarks.teachers [tiny | 95m] [NAME ...]
"""

import functools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from configs import base, tiny
from mert_jax.pretraining import build, step
from mert_jax.teachers import fitted_file, kmeans, mel_rvq
from tests.benchmarks import measure, rvq_vae

# base.py's batch of 1024 clips does not fit; the cost per clip hardly depends on the batch
SIZES = {
    "tiny": (tiny, dict(batch_size=16, group=8)),
    "95m": (base, {"batch_size": 4, "group": 2, "model.dtype": "float32"}),
}
NAMES = ("cqt", "random_projection", "random_projection+cqt", "rvq_vae", "kmeans", "mel_rvq")


def write_checkpoints(folder: str) -> dict[str, str]:
    """Write full-size teachers with random content to `folder`; return their paths by name."""
    rng = np.random.default_rng(0)
    paths = {name: f"{folder}/{name}" for name in ("rvq_vae", "kmeans", "mel_rvq")}
    rvq_vae.write_checkpoint(paths["rvq_vae"])
    for module in (kmeans, mel_rvq):
        shapes = module.shapes(module.SETTINGS)
        tensors = {name: abs(rng.normal(size=shape)) + 0.1 for name, shape in shapes.items()}
        fitted_file.write_fitted(paths[module.NAME], module.NAME, tensors, module.SETTINGS)
    return paths


def functions(size: str, names: Sequence[str], paths: dict[str, str]) -> dict[str, Any]:
    """Build a training step with these teachers and a call of the teachers alone.

    Also returns the temporary memory of each, MiB.
    """
    module, changes = SIZES[size]
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    config.teachers = tuple(names)
    for name in set(names) & set(paths):
        config.teacher[name] = {"checkpoint": paths[name]}
    made = build.make_teachers(build.check(config))
    student = build.make_student(config, made)
    optimizer = build.make_optimizer(config)
    objective = build.make_objective(config, student, made)
    state = jax.jit(lambda: nn.unbox(build.init(config, student, optimizer)))()
    params = jax.device_put({name: teacher.params for name, teacher in made.items()})
    before = max(objective.context.values(), default=0)  # samples of context for teachers only
    wave = rvq_vae.music(config.batch_size, before + config.data.num_samples)
    batch = jax.device_put({"audio": np.int16(10_000 * wave), "looped": np.zeros(len(wave), bool)})
    sizes = dict(accumulation=config.accumulation, group=config.group)
    train_step = functools.partial(
        step.train_step, objective=objective, optimizer=optimizer, **sizes
    )
    # the new state reuses the memory of the old one, as in train.py
    train_step = jax.jit(train_step, donate_argnums=0)
    train_step = train_step.lower(state, params, batch, jax.random.key(0)).compile()
    wave = jax.device_put(wave)
    teach = jax.jit(functools.partial(step.compute_targets, objective, length=wave.shape[-1]))
    teach = teach.lower(params, wave).compile()

    def one_step() -> None:
        nonlocal state
        state, metrics = train_step(state, params, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))

    def one_lesson() -> None:
        jax.block_until_ready(teach(params, wave))

    mib = [each.memory_analysis().temp_size_in_bytes / 2**20 for each in (teach, train_step)]
    return {"step": one_step, "teachers": one_lesson, "mib": tuple(mib)}


def _row(size: str, name: str, paths: dict[str, str]) -> dict[str, Any]:
    made = functions(size, name.split("+"), paths)
    teachers_mib, step_mib = made.pop("mib")
    repeats = 7 if size == "tiny" else 3
    seconds = measure.interleaved(made, repeats)
    label = f"teachers_{size}_{name}"
    ours = measure.Timing(seconds["teachers"], teachers_mib)
    theirs = measure.Timing(seconds["step"], step_mib)
    return measure.row(label, "training step", ours, theirs)


def rows(
    sizes: Sequence[str] = tuple(SIZES), names: Sequence[str] = NAMES
) -> Iterator[dict[str, Any]]:
    """Yield the rows `teachers_tiny_...` and `teachers_95m_...`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_checkpoints(folder)
        for size in sizes:
            for name in names:
                yield _row(size, name, paths)


if __name__ == "__main__":
    chosen = [each for each in sys.argv[1:] if each in SIZES]
    for row in rows(chosen or tuple(SIZES), [x for x in sys.argv[1:] if x in NAMES] or NAMES):
        print(row, f"{1 / row['ratio']:.1%} of the step", flush=True)
