"""Pretraining: `python -m mert_jax.train --config=configs/base.py --workdir=DIR`.

Weights come from WORKDIR's newest checkpoint or, where there is none, from the config's `init_from`
or, where that is not set, from initialisation.
"""

import functools
import json
import math
import time

import jax
from absl import flags
from flax import linen as nn
from ml_collections import config_flags

from mert_jax import (
    checkpoint,
    cli,
    data,
    datasets,
    metrics,
    recipe,
    records,
    sharding,
    step,
    warm_start,
)
from mert_jax.formats import workdir as workdirs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/base.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every parameter and exit.")


def main() -> int:
    """Train to `total_steps`; returns the exit code."""
    config = recipe.check(cli.config_of(_CONFIG))
    stored = datasets.stored_codes(config)
    teachers = recipe.make_teachers(config, stored)
    student = recipe.student(config, teachers, stored)
    print(recipe.describe(config, student, table=_DESCRIBE.value), flush=True)
    if _DESCRIBE.value:
        return 0
    if not _WORKDIR.value:
        raise cli.UserError("--workdir=DIR is needed: where checkpoints and metrics go")
    sources = datasets.open_datasets(config, "train", stored)
    validation = datasets.open_datasets(config, "validation", stored)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    begun = checkpoint.steps(_WORKDIR.value)
    fingerprints = recipe.fingerprints(config, teachers, stored)
    warm = None if begun else recipe.read_start(config, student, fingerprints)
    checkpoint.claim(_WORKDIR.value, json.loads(config.to_json()))
    if not begun and jax.process_index() == 0:
        workdirs.describe(_WORKDIR.value, student, recipe.about(config, fingerprints, warm))
    with jax.set_mesh(mesh):
        return train(config, _WORKDIR.value, student, teachers, mesh, sources, validation, warm)


def train(config, workdir, student, teachers, mesh, sources, validation, warm) -> int:
    """The run itself: state, compiled steps, and the loop over batches."""
    optimizer = recipe.make_optimizer(config)
    init = functools.partial(recipe.init, config, student, optimizer)
    shardings = sharding.state_shardings(init, mesh)
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    start = checkpoints.latest_step or 0
    if start >= config.total_steps:
        print(f"{workdir} is finished: {start} of {config.total_steps} steps; nothing to do")
        return 0
    if start:
        state = checkpoints.restore(jax.eval_shape(lambda: nn.unbox(init())), shardings)
        print(f"resuming {workdir} at step {start} of {config.total_steps}", flush=True)
    else:
        # sharded from birth: no device ever holds all of it
        state = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
        state = warm_start.begin(state, warm) if warm else state

    objective = recipe.objective(config, student, teachers)
    teacher_params = sharding.replicated({name: t.params for name, t in teachers.items()}, mesh)
    key = jax.random.key(config.seed)
    train_step, eval_step = step.compiled(
        objective, optimizer, config.accumulation, config.group, shardings
    )
    clips = dict(
        num_samples=config.data.num_samples,
        hop=records.HOP_LENGTH,
        context=max(objective.context.values(), default=0),
    )
    hosts = dict(host=jax.process_index(), num_hosts=jax.process_count())

    def put(batch):
        used = {name: batch[name] for name in ("audio", "looped", "codes")}
        return jax.tree.map(lambda rows: sharding.global_batch(rows, mesh), used)

    def validation_sums(params, source):
        eval_size = config.batch_size // config.accumulation
        batches = data.validation_batches(source, batch_size=eval_size, **clips, **hosts)
        for batch in data.prefetch(batches, put):
            yield eval_step(params, teacher_params, batch, key)

    def validate(params):
        return metrics.validation(
            [functools.reduce(metrics.add, validation_sums(params, s), None) for s in validation]
        )

    try:
        for directory, source in zip(datasets.directories(config), validation, strict=True):
            first = next(validation_sums(state.params, source))
            print(*recipe.check_labels(config, first, directory), sep="\n", flush=True)
    except cli.UserError:
        checkpoints.close()
        checkpoint.release(workdir)
        raise
    stream = data.train_stream(
        sources,
        weights=config.data.weights,
        batch_size=config.batch_size,
        seed=config.seed,
        start=start,
        threads=config.data.threads,
        workers=config.data.workers,
        **clips,
        **hosts,
    )
    learning_rate = recipe.schedule(config)
    saves = config.checkpoint
    policy = checkpoint.SavePolicy(saves.every_steps, saves.every_minutes, time.monotonic)
    speed = metrics.Speed(
        start,
        config.total_steps,
        audio_seconds=config.batch_size * clips["num_samples"] / records.SAMPLE_RATE,
        flops=3 * config.batch_size * student.flops(clips["num_samples"]),
    )
    writer = metrics.Writer(workdir, start, config.tensorboard) if hosts["host"] == 0 else None
    stop = cli.Stop()
    for number, batch in enumerate(data.prefetch(stream, put), start + 1):
        state, result = train_step(state, teacher_params, batch, key)
        last = number == config.total_steps or stop.signal
        save = policy.due(number) or last
        evaluate = number % config.eval_every == 0 or number == config.total_steps
        log = number % config.log_every == 0 or evaluate
        if log or save:
            row = {"step": number, **metrics.reduce(result["sums"])}
            row["grad_norm"] = float(result["grad_norm"])
            row["learning_rate"] = float(learning_rate(number - 1))
            row["looped_clips"] = int(result["looped"])
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                checkpoints.close()
                raise cli.UserError(
                    f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {number}: "
                    f"stopped; the last checkpoint is of step {checkpoints.latest_step}. Lower "
                    "optimizer.peak_learning_rate or optimizer.clip_norm, in a new workdir"
                )
        if log:  # not what was only saved: when that is depends on the clock
            row |= speed.measure(number)
            if evaluate:
                row |= validate(state.params)
                speed.pause()
            if writer:
                writer.write(row)
                print(metrics.console_line(row, config.total_steps, speed.eta(number)), flush=True)
        if save:
            checkpoints.save(number, state)
        if last:
            break
    stream.close()
    checkpoints.close()
    if writer:
        writer.close()
    if stop.signal and number < config.total_steps:
        print(f"stopped and saved at step {number}; run the same command to go on", flush=True)
        return 128 + stop.signal
    print(f"finished {number} steps: checkpoints, metrics.jsonl and config.json in {workdir}")
    print(f"curves: python -m mert_jax.report --workdir={workdir}", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
