"""A pretraining run in a workdir: its checks, its start or resumption, and its updates."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.checkpoints import manager
from mert_jax.checkpoints import workdir as workdirs
from mert_jax.checkpoints.init_from import InitialWeights, apply_initial_weights
from mert_jax.checkpoints.object_storage import RemoteWorkdir
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.data import code_checks
from mert_jax.data.loader import Batch, Loader, check_unchanged
from mert_jax.errors import UserError
from mert_jax.pretraining import build, loop, metrics, run_log, step
from mert_jax.runtime import goodput, watchdog, workdir_lock


def pretrain(config: ConfigDict, workdir: str | None, describe: bool = False) -> int:
    """Pretrain in `workdir` and return the exit code; `describe` prints the parameters instead.

    Config, datasets and workdir are checked before anything is written. Weights come from the
    workdir's newest intact checkpoint, else from the config's `init_from`, else they are new.
    Raises UserError for what the caller has to change.
    """
    stored = build.find_stored_codes(config)
    teachers = build.make_teachers(config, stored)
    student = build.student(config, teachers, stored)
    print(build.describe(config, student, table=describe), flush=True)
    if describe:
        return 0
    if not workdir:
        raise UserError("--workdir=DIR is needed: where checkpoints and metrics go")
    sources = {
        split: build.open_datasets(config, stored, split) for split in ("train", "validation")
    }
    mesh = build.make_mesh(config)
    settings = build.settings(config, student)
    with RemoteWorkdir(workdir, jax.process_index() == 0) as files:
        resumes = bool(manager.checkpoint_steps(workdir))
        fingerprints = build.fingerprints(config, teachers, stored)
        initial = None if resumes else build.read_initial_weights(config, student, fingerprints)
        about = build.about(config, fingerprints, initial)
        lock = workdir_lock.lock_workdir(files.folder, json.loads(config.to_json()), resumes)
        if resumes:
            before = workdirs.read_about(files.folder)
            check_unchanged(before.data, about.data, settings.accept_changes)
            about = before._replace(data=about.data)
        if jax.process_index() == 0:
            workdirs.write_description(files.folder, student, about)
        files.take()
        on_timeout = functools.partial(
            watchdog.end_stalled_run, files.folder, jax.process_index(), settings.watchdog_seconds
        )
        checkpoints = manager.Checkpoints(
            workdir, settings.keep, settings.keep_every, settings.intervals.save_every_steps
        )
        with (
            lock,
            jax.set_mesh(mesh),
            watchdog.watch(settings.watchdog_seconds, on_timeout) as beat,
            contextlib.closing(checkpoints),
        ):
            experiment = build.make_experiment(config, student, teachers, mesh)
            loader = build.make_loader(config, sources, mesh, experiment.context)
            run = Pretraining(
                settings, experiment, loader, sources["train"], files, checkpoints, beat
            )
            return run.train(initial)


def check_labels(sums: step.Sums, special_codes: int, directory: str) -> list[str]:
    """Return a line on the codes of each acoustic teacher in a batch of a dataset.

    Raises UserError with the numbers if they are degenerate or outside their codebooks.
    """
    return [
        code_checks.check_codes(
            f"labels of {name} in {directory}",
            np.asarray(codes.targets)[:, special_codes:],
            int(sums.frames),
        )
        for name, codes in sums.codes.items()
    ]


class Pretraining:
    """A run in an open workdir, as the `loop.Trainer` that makes its updates."""

    def __init__(
        self,
        settings: build.Settings,
        experiment: build.Experiment,
        loader: Loader,
        train_sources: Sequence[Any],
        files: RemoteWorkdir,
        checkpoints: manager.Checkpoints,
        beat: Callable[[], None],
    ):
        self._settings, self._experiment, self._loader = settings, experiment, loader
        self._train_sources, self._files = train_sources, files
        self._checkpoints, self._beat = checkpoints, beat
        self._total_steps = settings.intervals.total_steps
        self._mesh = experiment.shardings.step.mesh
        self._clock = goodput.Goodput(files.folder)
        self._key = jax.random.key(settings.seed)
        params = {name: teacher.params for name, teacher in experiment.teachers.items()}
        self._teacher_params = sharding.placed(params, sharding.replicated(self._mesh))

    def train(self, initial: InitialWeights | None) -> int:
        """Train to `total_steps`, from the newest checkpoint or `initial`; return the exit code."""
        settings, workdir, total = self._settings, self._files.workdir, self._total_steps
        start = self._checkpoints.latest_step
        if start is not None and start >= total:
            print(f"{workdir} is finished: {start} of {total} steps; nothing to do")
            return 0
        state = self._first_state(start, initial)
        self._check_labels(state)
        self._speed = metrics.Speed(
            int(state.step),
            total,
            audio_seconds=settings.update_seconds,
            flops=settings.update_flops,
        )
        self._log = run_log.RunLog(
            self._files.folder,
            self._train_sources,
            streak=settings.streak,
            max_faulty=settings.max_faulty,
            tensorboard=settings.tensorboard,
            step=int(state.step),
            batch=int(state.batch),
            writes=jax.process_index() == 0,
        )
        # a checkpoint relies on the metrics of all its steps: flush them first
        saver = loop.Saver(
            self._checkpoints, settings.intervals, self._clock, self._speed, self._files.flush
        )
        if start is None:  # so that a rollback always has a checkpoint to return to
            saver.save(0, state)
        state, request = loop.run(
            self,
            state,
            settings.intervals,
            saver=saver,
            clock=self._clock,
            speed=self._speed,
            log=self._log,
            publish=self._publish,
            beat=self._beat,
        )
        return self._end(int(state.step), request)

    def _first_state(self, start: int | None, initial: InitialWeights | None) -> TrainState:
        if start is None:
            state = self._experiment.init()
            return apply_initial_weights(state, initial) if initial else state
        state = self._restore()
        at = f"step {int(state.step)} of {self._total_steps}"
        print(f"resuming {self._files.workdir} at {at}", flush=True)
        return state

    def _restore(self, before: int | None = None) -> TrainState:
        with self._clock.time_of("restore"):
            return self._checkpoints.restore(
                self._experiment.abstract, self._experiment.shardings, before
            )

    def _check_labels(self, state: TrainState) -> None:
        """Print the perplexity of each dataset's codes; release the workdir if they are useless."""
        special_codes = self._experiment.objective.special_codes
        try:
            with self._clock.time_of("compile"):
                first_sums = [next(sums) for sums in self._validation_sums(state.params)]
                for directory, sums in zip(self._settings.directories, first_sums, strict=True):
                    lines = check_labels(sums, special_codes, directory)
                    print(*lines, sep="\n", flush=True)
        except UserError:
            workdir_lock.release_workdir(self._files.folder)
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
        self._files.push()

    def _end(self, step: int, request: int) -> int:
        workdir = self._files.workdir
        if jax.process_index() == 0:
            self._clock.write(step)
            spent = goodput.read_goodput(self._files.folder)
            print(goodput.summary_line(spent), flush=True)
        if request:
            print(f"stopped and saved at step {step}; run the same command to go on", flush=True)
            return loop.exit_code(request)
        print(f"finished {step} steps: checkpoints, metrics.jsonl and config.json in {workdir}")
        print(f"curves: python -m mert_jax.report --workdir={workdir}", flush=True)
        return 0

    def position(self, state: TrainState) -> int:
        """Return the number of the next batch."""
        return int(state.batch)

    def batches(self, position: int) -> Iterator[Batch]:
        """Return the global batches from number `position` on."""
        return self._loader.train(position)

    def update(self, state: TrainState, batch: Batch, request: int) -> tuple[TrainState, Any]:
        """Make one update; every host's `request` travels with the batch."""
        batch["requests"] = sharding.each_host(request, self._mesh)
        return self._experiment.train_step(state, self._teacher_params, batch, self._key)

    def decide(self, step: int, batch: int, result: Any, last: bool) -> run_log.StepDecision:
        """Judge the steps so far by the run's log."""
        return self._log.decide(step, batch, result, last)

    def may_save(self, result: Any) -> bool:
        """Return False within a streak of rejected steps."""
        return not int(result["guard"].streak)

    def roll_back(self, state: TrainState, streak: run_log.BadStreak) -> TrainState:
        """Return the state of the newest checkpoint before `streak`, past its batches.

        Raises UserError after the last rollback that the config allows.
        """
        steps, rollbacks = self._settings.streak, int(state.guard.rollbacks)
        if rollbacks >= self._settings.rollbacks:
            raise UserError(
                f"{steps} updates in a row were rejected, the first at step {streak.first_step}, "
                f"after {rollbacks} rollbacks (guard.rollbacks): see "
                f"{self._files.workdir}/{run_log.BAD_STEPS}. Lower optimizer.peak_learning_rate or "
                "optimizer.clip_norm, in a new workdir"
            )
        earlier = self._restore(before=streak.first_step)
        self._checkpoints.forget(above=int(earlier.step))
        print(
            f"{steps} bad steps in a row: going back to step {int(earlier.step)}, "
            f"and on with batch {streak.next_batch}",
            flush=True,
        )
        self._clock.went_back()
        return step.redirect(earlier, streak.next_batch, rollbacks + 1)

    def row(self, step: int, state: TrainState, result: Any, evaluate: bool) -> loop.Row:
        """Return the row of metrics.jsonl, with the validation splits' on request."""
        row = {
            "step": step,
            **metrics.reduce(result["sums"]),
            "grad_norm": float(result["grad_norm"]),
            "learning_rate": float(self._experiment.learning_rate(int(result["updates"]))),
            "looped_clips": int(result["looped"]),
            "skipped_steps": int(result["guard"].skipped),
            **self._speed.measure(step),
        }
        if evaluate:
            with self._clock.time_of("validation"):
                by_dataset = self._validation_sums(state.params)
                row |= metrics.validation([functools.reduce(metrics.add, x) for x in by_dataset])
            self._speed.pause()
        return row

    def line(self, row: loop.Row, eta: str) -> str:
        """Return the console's line of a row."""
        return metrics.console_line(row, self._total_steps, eta)
