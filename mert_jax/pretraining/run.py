"""A pretraining run in a workdir: its checks, its start or resumption, and its updates."""

import contextlib
import functools
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.checkpoints import manager
from mert_jax.checkpoints import workdir as workdirs
from mert_jax.checkpoints.init_from import InitialWeights, apply_initial_weights
from mert_jax.checkpoints.object_storage import WorkdirMirror
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.data import code_checks
from mert_jax.data.bad_records import BadRecords
from mert_jax.data.loader import Batch, Loader, check_unchanged
from mert_jax.errors import RESTART, UserError
from mert_jax.files import Row
from mert_jax.pretraining import build, loop, metrics, run_log, step
from mert_jax.runtime import goodput, watchdog, workdir_lock


def pretrain(config: ConfigDict, workdir: str | None, describe: bool = False) -> int:
    """Pretrain in `workdir` and return the exit code; `describe` prints the parameters instead.

    Config, datasets and workdir are checked before anything is written: UserError says what to
    change. Weights are those of the workdir's newest intact checkpoint, of `init_from`, or new.
    """
    stored = build.find_stored_codes(config)
    teachers = build.make_teachers(config, stored)
    student = build.make_student(config, teachers, stored)
    print(build.describe(config, student, table=describe), flush=True)
    if describe:
        return 0
    if not workdir:
        raise UserError("--workdir=DIR is needed: where checkpoints and metrics go")
    splits = ("train", "validation")
    sources = {split: build.open_datasets(config, stored, split) for split in splits}
    mesh, settings = build.make_mesh(config), build.make_settings(config, student)
    with WorkdirMirror(workdir, jax.process_index() == 0) as mirror:
        resumes = bool(manager.checkpoint_steps(workdir))
        fingerprints = build.teacher_fingerprints(config, teachers, stored)
        initial = None if resumes else build.read_initial_weights(config, student, fingerprints)
        about = build.make_about(config, fingerprints, initial)
        lock = workdir_lock.lock_workdir(mirror.folder, json.loads(config.to_json()), resumes)
        if resumes:
            before = workdirs.read_about(mirror.folder)
            check_unchanged(before.data, about.data, settings.accept_changes)
            about = before._replace(data=about.data)
        if jax.process_index() == 0:
            workdirs.write_description(mirror.folder, student, about)
        mirror.claim()
        host, seconds = jax.process_index(), settings.watchdog_seconds
        on_timeout = functools.partial(watchdog.end_stalled_run, mirror.folder, host, seconds)
        checkpoints = manager.Checkpoints(
            workdir, settings.keep, settings.keep_every, settings.intervals.save_every_steps
        )
        with (
            lock,
            jax.set_mesh(mesh),
            watchdog.watch(seconds, on_timeout) as beat,
            contextlib.closing(checkpoints),
        ):
            experiment = build.make_experiment(config, student, teachers, mesh)
            context = experiment.objective.longest_context
            loader = build.make_loader(config, sources, mesh, context)
            run = Pretraining(settings, experiment, loader, mirror, checkpoints, beat)
            return run.train(initial)


def check_first_codes(sums: step.Sums, special_codes: int, directory: str) -> list[str]:
    """Return a line on each teacher's codes in a batch. Raises UserError if they are useless."""
    lines = []
    for name, codes in sums.codes.items():
        counts = np.asarray(codes.targets)[:, special_codes:]
        title = f"labels of {name} in {directory}"
        lines.append(code_checks.check_codes(title, counts, int(sums.frames)))
    return lines


class Pretraining:
    """A run in an open workdir, as the `loop.Trainer` that makes its updates."""

    def __init__(
        self,
        settings: build.Settings,
        experiment: build.Experiment,
        loader: Loader,
        mirror: WorkdirMirror,
        checkpoints: manager.Checkpoints,
        beat: Callable[[], None],
    ):
        self._settings, self._experiment, self._loader = settings, experiment, loader
        self._mirror, self._checkpoints, self._beat = mirror, checkpoints, beat
        self._clock = goodput.Goodput(mirror.folder)
        self._key = jax.random.key(settings.seed)
        params = {name: teacher.params for name, teacher in experiment.teachers.items()}
        self._teacher_params = sharding.placed(params, sharding.replicated(loader.mesh))

    def train(self, initial: InitialWeights | None) -> int:
        """Train to `total_steps`, from the newest checkpoint or `initial`; return the exit code."""
        settings, mirror, experiment = self._settings, self._mirror, self._experiment
        total, start = settings.intervals.total_steps, self._checkpoints.latest_step
        if start is not None and start >= total:
            print(f"{mirror.workdir} is finished: {start} of {total} steps; nothing to do")
            return 0
        if start is None:
            state = experiment.init()
            state = apply_initial_weights(state, initial) if initial else state
        else:
            state = self._restore()
            print(f"resuming {mirror.workdir} at step {int(state.step)} of {total}", flush=True)
        self._check_codes(state)
        step, batch, writes = int(state.step), int(state.batch), jax.process_index() == 0
        folder, intervals, clock = mirror.folder, settings.intervals, self._clock
        speed = metrics.Speed(step, total, settings.update_seconds, settings.update_flops)
        self._speed = speed
        sources, max_faulty = self._loader.sources["train"], self._loader.max_faulty
        bad_records = BadRecords(folder, sources, max_faulty, batch, writes)
        self._run_log = run_log.RunLog(folder, bad_records, settings.streak, batch, writes)
        # a checkpoint relies on the metrics of all its steps: flush them first
        saver = loop.Saver(self._checkpoints, intervals, clock, speed, before=mirror.flush)
        if start is None:  # so that a rollback always has a checkpoint to return to
            saver.save(0, state)
        writer = metrics.Writer(folder, step, settings.tensorboard, writes)
        state, request = loop.run(
            self, state, intervals, saver, clock, speed, writer, self._publish, self._beat
        )
        self._run_log.close()
        return self._end(int(state.step), request)

    def _restore(self, before: int | None = None) -> TrainState:
        abstract, shardings = self._experiment.abstract, self._experiment.shardings
        with self._clock.time_of("restore"):
            return self._checkpoints.restore(abstract, shardings, before)

    def _check_codes(self, state: TrainState) -> None:
        """Print the perplexity of each dataset's codes; release the workdir if they are useless."""
        special_codes = self._experiment.objective.special_codes
        try:
            with self._clock.time_of("compile"):
                first_sums = [next(sums) for sums in self._validation_sums(state.params)]
                for directory, sums in zip(self._settings.directories, first_sums, strict=True):
                    lines = check_first_codes(sums, special_codes, directory)
                    print(*lines, sep="\n", flush=True)
        except UserError:
            workdir_lock.release_workdir(self._mirror.folder)
            raise

    def _validation_sums(self, params: Any) -> Iterator[Iterator[step.Sums]]:
        """Yield, for each dataset, the sums of its validation batches."""

        def evaluate(batch: Batch) -> step.Sums:
            self._beat()
            return self._experiment.eval_step(params, self._teacher_params, batch, self._key)

        return (map(evaluate, batches) for batches in self._loader.validation())

    def _publish(self, step: int) -> None:
        if jax.process_index() == 0:
            self._clock.write(step)
        self._mirror.push()

    def _end(self, step: int, request: int) -> int:
        workdir = self._mirror.workdir
        if jax.process_index() == 0:
            self._clock.write(step)
            print(goodput.summary_line(goodput.read_goodput(self._mirror.folder)), flush=True)
        if request:
            print(f"stopped and saved at step {step}; run the same command to go on", flush=True)
            # SIGTERM is a preemption, after which launchers start the run again; Ctrl-C is not
            return RESTART if request == signal.SIGTERM else 128 + request
        print(f"finished {step} steps: checkpoints, metrics.jsonl and config.json in {workdir}")
        print(f"curves: python -m mert_jax.report --workdir={workdir}", flush=True)
        return 0

    # as documented in `loop.Trainer`

    def next_batch(self, state: TrainState) -> int:
        return int(state.batch)

    def batches(self, start: int) -> Iterator[Batch]:
        return self._loader.train(start)

    def update(self, state: TrainState, batch: Batch, request: int) -> tuple[TrainState, Any]:
        # every host's request travels with the batch
        batch["requests"] = sharding.each_host(request, self._loader.mesh)
        return self._experiment.train_step(state, self._teacher_params, batch, self._key)

    def decide(self, step: int, batch: int, result: Any, last: bool) -> run_log.StepDecision:
        return self._run_log.decide(step, batch, result, last)

    def may_save(self, result: Any) -> bool:
        return not int(result["guard"].streak)

    def roll_back(self, state: TrainState, streak: run_log.BadStreak) -> TrainState:
        """Return the last saved state before `streak`. Raises UserError after `guard.rollbacks`."""
        steps, rollbacks = self._settings.streak, int(state.guard.rollbacks)
        if rollbacks >= self._settings.rollbacks:
            raise UserError(
                f"{steps} updates in a row were rejected, the first at step "
                f"{streak.first_step}, after {rollbacks} rollbacks (guard.rollbacks): see "
                f"{self._mirror.workdir}/{run_log.BAD_STEPS}. Lower optimizer.peak_learning_rate "
                "or optimizer.clip_norm, in a new workdir"
            )
        earlier = self._restore(before=streak.first_step)
        back = int(earlier.step)
        self._checkpoints.forget(above=back)
        print(
            f"{steps} bad steps in a row: going back to step {back}, "
            f"and on with batch {streak.next_batch}",
            flush=True,
        )
        self._clock.went_back()
        # an earlier state, but the batch after the bad ones: they are passed over
        numbers = np.int32(streak.next_batch), np.int32(rollbacks + 1)
        batch, count = sharding.placed(numbers, earlier.batch.sharding)
        return earlier._replace(batch=batch, guard=earlier.guard._replace(rollbacks=count))

    def row(self, step: int, state: TrainState, result: Any, evaluate: bool) -> Row:
        row = {
            "step": step,
            **metrics.to_row(result["sums"]),
            "grad_norm": float(result["grad_norm"]),
            "learning_rate": float(self._experiment.learning_rate(int(result["updates"]))),
            "looped_clips": int(result["looped"]),
            "skipped_steps": int(result["guard"].skipped),
            **self._speed.measure(step),
        }
        if evaluate:
            with self._clock.time_of("validation"):
                by_dataset = self._validation_sums(state.params)
                totals = [functools.reduce(metrics.add, sums) for sums in by_dataset]
                row |= metrics.validation_row(totals)
            self._speed.pause()
        return row

    def line(self, row: Row, eta: str) -> str:
        return metrics.console_line(row, self._settings.intervals.total_steps, eta)
