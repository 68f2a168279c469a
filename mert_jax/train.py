"""Pretraining: `python -m mert_jax.train --config=configs/base.py --workdir=DIR`.

Weights come from WORKDIR's newest checkpoint that is whole or, where there is none, from the
config's `init_from` or, where that is not set, from initialisation.
"""

import contextlib
import functools
import json
import signal
import time

import jax
from absl import flags
from flax import linen as nn
from ml_collections import config_flags

from mert_jax import (
    bad_steps,
    checkpoint,
    cli,
    data,
    datasets,
    faults,
    goodput,
    metrics,
    recipe,
    records,
    sharding,
    step,
    validation,
    warm_start,
    watchdog,
)
from mert_jax.formats import workdir as workdirs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, such as configs/base.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every parameter and exit.")


def main() -> int:
    """Train to `total_steps`; returns the exit code."""
    config, workdir = recipe.check(cli.config_of(_CONFIG)), _WORKDIR.value
    stored = datasets.stored_codes(config)
    teachers = recipe.make_teachers(config, stored)
    student = recipe.student(config, teachers, stored)
    print(recipe.describe(config, student, table=_DESCRIBE.value), flush=True)
    if _DESCRIBE.value:
        return 0
    if not workdir:
        raise cli.UserError("--workdir=DIR is needed: where checkpoints and metrics go")
    splits = ("train", "validation")
    sources = {split: datasets.open_datasets(config, split, stored) for split in splits}
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    begun = checkpoint.steps(workdir)
    fingerprints = recipe.fingerprints(config, teachers, stored)
    warm = None if begun else recipe.read_start(config, student, fingerprints)
    about = recipe.about(config, fingerprints, warm)
    held = checkpoint.claim(workdir, json.loads(config.to_json()))
    if begun:
        before = workdirs.about(workdir)
        datasets.check_unchanged(before.data, about.data, config.data.accept_changes)
        about = before._replace(data=about.data)
    if jax.process_index() == 0:
        workdirs.describe(workdir, student, about)
    saves, patience = config.checkpoint, 60 * config.watchdog_minutes
    bark = functools.partial(watchdog.end, workdir, jax.process_index(), patience)
    with (
        held,
        jax.set_mesh(mesh),
        watchdog.Watchdog(patience, bark) as dog,
        contextlib.closing(checkpoint.Checkpoints(workdir, saves.keep, saves.keep_every)) as kept,
    ):
        return train(config, workdir, student, teachers, mesh, sources, warm, kept, dog)


def train(config, workdir, student, teachers, mesh, sources, warm, checkpoints, dog) -> int:
    """The run itself: state, compiled steps, and the loop over batches."""
    clock = goodput.Goodput(workdir)
    optimizer = recipe.make_optimizer(config)
    init = functools.partial(recipe.init, config, student, optimizer)
    shardings = sharding.state_shardings(init, mesh)
    abstract = jax.eval_shape(lambda: nn.unbox(init()))
    start = checkpoints.latest_step or 0
    if start >= config.total_steps:
        print(f"{workdir} is finished: {start} of {config.total_steps} steps; nothing to do")
        return 0
    if start:
        with clock.time_of("restore"):
            state = checkpoints.restore(abstract, shardings)
        number, position = int(state.step), int(state.batch)
        print(f"resuming {workdir} at step {number} of {config.total_steps}", flush=True)
    else:
        # sharded from birth: no device ever holds all of it
        state = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
        state = warm_start.begin(state, warm) if warm else state
        number = position = 0

    objective = recipe.objective(config, student, teachers)
    teacher_params = sharding.replicated({name: t.params for name, t in teachers.items()}, mesh)
    key = jax.random.key(config.seed)
    train_step, eval_step = step.compiled(
        objective,
        optimizer,
        config.accumulation,
        config.group,
        config.guard.factor,
        shardings,
    )
    clips = dict(
        num_samples=config.data.num_samples,
        hop=records.HOP_LENGTH,
        context=max(objective.context.values(), default=0),
        host=jax.process_index(),
        num_hosts=jax.process_count(),
    )

    def put(batch):
        used = {name: batch[name] for name in ("audio", "looped", "codes")}
        return jax.tree.map(lambda rows: sharding.global_batch(rows, mesh), used)

    def batches(start):
        stream = data.train_stream(
            sources["train"],
            weights=config.data.weights,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            threads=config.data.threads,
            workers=config.data.workers,
            **clips,
        )
        ids = lambda batch: {name: batch[name] for name in ("record", "faulty")}
        return data.prefetch(stream, lambda batch: (ids(batch), put(batch)))

    held_out = validation.Validation(
        sources["validation"],
        lambda params, batch: eval_step(params, teacher_params, batch, key),
        put,
        dog.pat,
        config.data.max_faulty,
        batch_size=config.batch_size // config.accumulation,
        **clips,
    )
    try:
        with clock.time_of("compile"):
            firsts = zip(datasets.directories(config), held_out.first(state.params), strict=True)
            for directory, sums in firsts:
                print(*recipe.check_labels(config, sums, directory), sep="\n", flush=True)
    except cli.UserError:
        checkpoint.release(workdir)
        raise
    learning_rate = recipe.schedule(config)
    saves = config.checkpoint
    policy = checkpoint.SavePolicy(saves.every_steps, saves.every_minutes, time.monotonic)
    speed = metrics.Speed(
        number,
        config.total_steps,
        audio_seconds=config.batch_size * clips["num_samples"] / records.SAMPLE_RATE,
        flops=3 * config.batch_size * student.flops(clips["num_samples"]),
    )
    first = jax.process_index() == 0
    writer = metrics.Writer(workdir, number, config.tensorboard) if first else None
    host = dict(start=position, host=jax.process_index())
    skipped = bad_steps.BadSteps(workdir, config.guard.streak, **host)
    replaced = faults.Faults(workdir, sources["train"], config.data.max_faulty, **host)
    stream = batches(position)
    stop, kind = cli.Stop(), "compile"
    clock.begin(number)

    def go_back(state, course):
        """The state of the newest checkpoint before a course of bad steps, past its batches."""
        rollbacks = int(state.guard.rollbacks)
        if rollbacks >= config.guard.rollbacks:
            raise cli.UserError(
                f"{config.guard.streak} updates in a row could not be made, the first at step "
                f"{course.first_step}, after going back {rollbacks} times (guard.rollbacks): see "
                f"{workdir}/{bad_steps.FILE}. Lower optimizer.peak_learning_rate or "
                "optimizer.clip_norm, in a new workdir"
            )
        earlier = checkpoints.restore(
            abstract, shardings, before=course.first_step, every=saves.every_steps
        )
        checkpoints.forget(above=int(earlier.step))
        print(
            f"{config.guard.streak} bad steps in a row: going back to step {int(earlier.step)}, "
            f"and on with batch {course.next_batch}",
            flush=True,
        )
        return step.redirected(earlier, course.next_batch, rollbacks + 1)

    while number < config.total_steps:
        dog.pat()
        checkpoints.check()
        with clock.time_of("data_wait"):
            ids, batch = next(stream)
        with clock.time_of(kind):
            state, result = train_step(state, teacher_params, batch, key)
        kind = "step"
        number, position = number + 1, position + 1
        last = number == config.total_steps or stop.signal
        replaced.note(number, position - 1, ids)
        course = skipped.note(number, position - 1, result, ids["record"])
        if last and not course:
            course = skipped.flush()
        if course:
            with clock.time_of("restore"):
                state = go_back(state, course)
            clock.went_back()
            number, position = int(state.step), course.next_batch
            stream.close()
            stream = batches(position)
            skipped.forget()
            speed.pause()
            if writer:
                writer.back_to(number)
            continue
        evaluate = number % config.eval_every == 0 or number == config.total_steps
        if number % config.log_every == 0 or evaluate:
            row = {"step": number, **metrics.reduce(result["sums"])}
            row["grad_norm"] = float(result["grad_norm"])
            row["learning_rate"] = float(learning_rate(int(result["updates"])))
            row["looped_clips"] = int(result["looped"])
            row["skipped_steps"] = int(result["guard"].skipped)
            row |= speed.measure(number)
            if evaluate:
                with clock.time_of("validation"):
                    row |= held_out.row(state.params)
                speed.pause()
            if writer:
                writer.write(row)
                clock.write(number)
                print(metrics.console_line(row, config.total_steps, speed.eta(number)), flush=True)
        # a course of bad steps must not push out the checkpoints to go back to
        if (policy.due(number) and not int(result["guard"].streak)) or last:
            with clock.time_of("save"):
                checkpoints.save(number, state)
            clock.saved(number)
        if last:
            break
    stream.close()
    with clock.time_of("save"):
        checkpoints.wait()
    skipped.close()
    replaced.close()
    if writer:
        writer.close()
        clock.write(number)
        print(goodput.line(goodput.read(workdir)), flush=True)
    if stop.signal and number < config.total_steps:
        print(f"stopped and saved at step {number}; run the same command to go on", flush=True)
        return watchdog.RESTART if stop.signal == signal.SIGTERM else 128 + stop.signal
    print(f"finished {number} steps: checkpoints, metrics.jsonl and config.json in {workdir}")
    print(f"curves: python -m mert_jax.report --workdir={workdir}", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
