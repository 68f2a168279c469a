"""Pretraining: `python -m mert_jax.train --config=configs/base.py --workdir=DIR`.

Weights come from WORKDIR's newest checkpoint that is whole or, where there is none, from the
config's `init_from` or, where that is not set, from initialisation.
"""

import contextlib
import functools
import json
import signal
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from mert_jax import cli, sharding
from mert_jax.checkpoints import init_from, manager
from mert_jax.checkpoints import workdir as workdirs
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import loader, mix
from mert_jax.errors import RESTART, UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.pretraining import bad_steps, build, metrics, program, run_log, step, validation
from mert_jax.runtime import distributed, goodput, watchdog, workdir_lock
from mert_jax.runtime.remote_workdir import RemoteWorkdir
from mert_jax.runtime.signals import StopSignal
from mert_jax.teachers.teacher import Teacher

FLAGS = flags.FlagValues()

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, such as configs/base.py.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and metrics go.", flag_values=FLAGS
)
_DESCRIBE = flags.DEFINE_bool(
    "describe", False, "Print every parameter and exit.", flag_values=FLAGS
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where neither TPU nor Slurm says it.",
    flag_values=FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes, with --coordinator.", flag_values=FLAGS
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0 on.", flag_values=FLAGS
)
_CONNECT_SECONDS = flags.DEFINE_float(
    "connect_seconds", 300.0, "How long to wait for the others.", flag_values=FLAGS
)


def main() -> int:
    """Train to `total_steps`; returns the exit code."""
    config = build.check(cli.config_of(_CONFIG))
    named = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    patience = _CONNECT_SECONDS.value
    with distributed.connect(distributed.find_cluster(*named, patience), patience):
        return prepare_and_train(config, _WORKDIR.value)


def prepare_and_train(config: ConfigDict, workdir: str | None) -> int:
    """What can go wrong before anything is written, then the run."""
    stored = mix.find_stored_codes(config)
    teachers = build.make_teachers(config, stored)
    student = build.student(config, teachers, stored)
    print(build.describe(config, student, table=_DESCRIBE.value), flush=True)
    if _DESCRIBE.value:
        return 0
    if not workdir:
        raise UserError("--workdir=DIR is needed: where checkpoints and metrics go")
    splits = ("train", "validation")
    sources = {split: mix.open_datasets(config, split, stored) for split in splits}
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    with RemoteWorkdir(workdir, jax.process_index() == 0) as files:
        begun = bool(manager.checkpoint_steps(workdir))
        fingerprints = build.fingerprints(config, teachers, stored)
        warm = None if begun else build.read_start(config, student, fingerprints)
        about = build.about(config, fingerprints, warm)
        held = workdir_lock.lock_workdir(files.folder, json.loads(config.to_json()), begun)
        if begun:
            before = workdirs.read_about(files.folder)
            mix.check_unchanged(before.data, about.data, config.data.accept_changes)
            about = before._replace(data=about.data)
        if jax.process_index() == 0:
            workdirs.write_description(files.folder, student, about)
        files.take()
        patience = 60 * config.watchdog_minutes
        bark = functools.partial(
            watchdog.end_stalled_run, files.folder, jax.process_index(), patience
        )
        saves = config.checkpoint
        kept = manager.Checkpoints(workdir, saves.keep, saves.keep_every, saves.every_steps)
        with (
            held,
            jax.set_mesh(mesh),
            watchdog.Watchdog(patience, bark) as dog,
            contextlib.closing(kept),
        ):
            return train(config, files, student, teachers, mesh, sources, warm, kept, dog)


def train(
    config: ConfigDict,
    files: RemoteWorkdir,
    student: Student,
    teachers: Mapping[str, Teacher],
    mesh: jax.sharding.Mesh,
    sources: Mapping[str, Any],
    warm: init_from.InitialWeights | None,
    checkpoints: manager.Checkpoints,
    dog: watchdog.Watchdog,
) -> int:
    """The run itself: state, compiled steps, and the loop over batches."""
    workdir = files.workdir
    clock = goodput.Goodput(files.folder)
    made = program.make(config, student, teachers, mesh)
    if (start := checkpoints.latest_step) is None:
        state = made.init()
        state = init_from.apply_initial_weights(state, warm) if warm else state
    elif start >= config.total_steps:
        print(f"{workdir} is finished: {start} of {config.total_steps} steps; nothing to do")
        return 0
    else:
        with clock.time_of("restore"):
            state = checkpoints.restore(made.abstract, made.shardings)
        at = f"step {int(state.step)} of {config.total_steps}"
        print(f"resuming {workdir} at {at}", flush=True)
    number, position = int(state.step), int(state.batch)
    key = jax.random.key(config.seed)
    whole = sharding.replicated(mesh)
    teacher_params = sharding.placed({name: t.params for name, t in teachers.items()}, whole)
    batches = loader.Loader(config, sources, mesh, made.context)
    held_out = validation.Validation(
        batches.validation,
        lambda params, batch: made.eval_step(params, teacher_params, batch, key),
        dog.pat,
    )
    try:
        with clock.time_of("compile"):
            firsts = zip(mix.dataset_directories(config), held_out.first(state.params), strict=True)
            for directory, sums in firsts:
                print(*build.check_labels(config, sums, directory), sep="\n", flush=True)
    except UserError:
        workdir_lock.release_workdir(files.folder)
        raise
    saves = config.checkpoint
    policy = manager.SavePolicy(saves.every_steps, saves.every_minutes, time.monotonic)
    learning_rate = build.schedule(config)
    speed = metrics.Speed(
        number,
        config.total_steps,
        audio_seconds=config.batch_size * config.data.num_samples / SAMPLE_RATE,
        flops=3 * config.batch_size * student.flops(config.data.num_samples),
    )
    first = jax.process_index() == 0
    log = run_log.RunLog(
        files.folder,
        sources["train"],
        streak=config.guard.streak,
        max_faulty=config.data.max_faulty,
        tensorboard=config.tensorboard,
        step=number,
        batch=position,
        first=first,
    )

    def save(number: int) -> None:
        with clock.time_of("save"):
            files.flush()  # the metrics of every step that a checkpoint holds
            checkpoints.save(number, state)
        clock.saved(number)
        policy.saved()
        speed.pause()

    def row_of(number: int, result: Mapping[str, Any], evaluate: bool) -> dict[str, Any]:
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
        return row

    def go_back(course: bad_steps.BadStreak) -> TrainState:
        """The state of the newest checkpoint before a course of bad steps, past its batches."""
        rollbacks = int(state.guard.rollbacks)
        if rollbacks >= config.guard.rollbacks:
            raise UserError(
                f"{config.guard.streak} updates in a row could not be made, the first at step "
                f"{course.first_step}, after going back {rollbacks} times (guard.rollbacks): see "
                f"{workdir}/{bad_steps.FILE}. Lower optimizer.peak_learning_rate or "
                "optimizer.clip_norm, in a new workdir"
            )
        with clock.time_of("restore"):
            earlier = checkpoints.restore(made.abstract, made.shardings, course.first_step)
        checkpoints.forget(above=int(earlier.step))
        print(
            f"{config.guard.streak} bad steps in a row: going back to step {int(earlier.step)}, "
            f"and on with batch {course.next_batch}",
            flush=True,
        )
        clock.went_back()
        return step.redirected(earlier, course.next_batch, rollbacks + 1)

    stop, kind = StopSignal(), "compile"
    stream = batches.train(position)
    clock.begin(number)
    if start is None:  # so that there is always one to go back to
        save(number)
    stopping = False
    while number < config.total_steps and not stopping:
        dog.pat()
        checkpoints.check()
        with clock.time_of("data_wait"):
            batch = next(stream)
        wish = stop.signal or run_log.SAVE * policy.overdue
        batch["wishes"] = sharding.each_host(wish, mesh)
        with clock.time_of(kind):
            state, result = made.train_step(state, teacher_params, batch, key)
        number, position, kind = number + 1, position + 1, "step"
        last = number == config.total_steps
        verdict = log.note(number, position - 1, result, last)
        if verdict.course:
            state = go_back(verdict.course)
            number, position = int(state.step), int(state.batch)
            stream.close()
            stream = batches.train(position)
            log.back_to(number)
            speed.pause()
            continue
        stopping = verdict.wish > run_log.SAVE
        evaluate = number % config.eval_every == 0 or last
        if number % config.log_every == 0 or evaluate:
            row = row_of(number, result, evaluate)
            log.write(row)
            if first:
                clock.write(number)
            files.push()
            print(metrics.console_line(row, config.total_steps, speed.eta(number)), flush=True)
        due = policy.due(number, verdict.wish == run_log.SAVE)
        # a course of bad steps must not push out the checkpoints to go back to
        if last or stopping or (due and not int(result["guard"].streak)):
            save(number)
    stream.close()
    with clock.time_of("save"):
        checkpoints.wait()
    log.close()
    if first:
        clock.write(number)
        print(goodput.summary_line(goodput.read_goodput(files.folder)), flush=True)
    if number < config.total_steps:
        print(f"stopped and saved at step {number}; run the same command to go on", flush=True)
        return RESTART if verdict.wish == signal.SIGTERM else 128 + verdict.wish
    print(f"finished {number} steps: checkpoints, metrics.jsonl and config.json in {workdir}")
    print(f"curves: python -m mert_jax.report --workdir={workdir}", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
