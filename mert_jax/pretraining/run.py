"""A pretraining run in a workdir: what it checks, restores and trains."""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.checkpoints import init_from, manager
from mert_jax.checkpoints import workdir as workdirs
from mert_jax.checkpoints.train_state import TrainState
from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import loader, mix
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.pretraining import bad_steps, build, loop, metrics, run_log, step, validation
from mert_jax.runtime import goodput, watchdog, workdir_lock
from mert_jax.runtime.remote_workdir import RemoteWorkdir
from mert_jax.teachers.teacher import Teacher


def pretrain(config: ConfigDict, workdir: str | None, describe: bool = False) -> int:
    """Pretrain in `workdir` and return the exit code; `describe` prints the parameters instead.

    Whatever can be wrong with config, datasets and workdir is found before anything is written.
    Weights come from the workdir's newest intact checkpoint, else from the config's `init_from`,
    else from initialisation. Raises UserError for what the caller has to change.
    """
    stored = mix.find_stored_codes(config)
    teachers = build.make_teachers(config, stored)
    student = build.student(config, teachers, stored)
    print(build.describe(config, student, table=describe), flush=True)
    if describe:
        return 0
    if not workdir:
        raise UserError("--workdir=DIR is needed: where checkpoints and metrics go")
    splits = ("train", "validation")
    sources = {split: mix.open_datasets(config, split, stored) for split in splits}
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    with RemoteWorkdir(workdir, jax.process_index() == 0) as files:
        resumes = bool(manager.checkpoint_steps(workdir))
        fingerprints = build.fingerprints(config, teachers, stored)
        initial = None if resumes else build.read_start(config, student, fingerprints)
        about = build.about(config, fingerprints, initial)
        lock = workdir_lock.lock_workdir(files.folder, json.loads(config.to_json()), resumes)
        if resumes:
            before = workdirs.read_about(files.folder)
            mix.check_unchanged(before.data, about.data, config.data.accept_changes)
            about = before._replace(data=about.data)
        if jax.process_index() == 0:
            workdirs.write_description(files.folder, student, about)
        files.take()
        patience = 60 * config.watchdog_minutes
        on_timeout = functools.partial(
            watchdog.end_stalled_run, files.folder, jax.process_index(), patience
        )
        saves = config.checkpoint
        checkpoints = manager.Checkpoints(workdir, saves.keep, saves.keep_every, saves.every_steps)
        with (
            lock,
            jax.set_mesh(mesh),
            watchdog.Watchdog(patience, on_timeout) as dog,
            contextlib.closing(checkpoints),
        ):
            run = Pretraining(
                config, files, student, teachers, mesh, sources, checkpoints, dog.beat
            )
            return run.train(initial)


class Pretraining:
    """A run in an open workdir, as the `loop.Trainer` that makes its updates."""

    def __init__(
        self,
        config: ConfigDict,
        files: RemoteWorkdir,
        student: Student,
        teachers: Mapping[str, Teacher],
        mesh: Mesh,
        sources: Mapping[str, Any],
        checkpoints: manager.Checkpoints,
        beat: Any,
    ):
        self._config, self._files, self._mesh, self._beat = config, files, mesh, beat
        self._checkpoints, self._sources = checkpoints, sources
        self._flops = 3 * config.batch_size * student.flops(config.data.num_samples)
        self._clock = goodput.Goodput(files.folder)
        self._experiment = build.make_experiment(config, student, teachers, mesh)
        self._key = jax.random.key(config.seed)
        self._learning_rate = build.schedule(config)
        params = {name: teacher.params for name, teacher in teachers.items()}
        self._teacher_params = sharding.placed(params, sharding.replicated(mesh))
        self._loader = loader.Loader(config, sources, mesh, self._experiment.context)
        self._validation = validation.Validation(
            self._loader.validation,
            lambda params, batch: self._experiment.eval_step(
                params, self._teacher_params, batch, self._key
            ),
            beat,
        )

    def train(self, initial: init_from.InitialWeights | None) -> int:
        """Train to `total_steps`, from the newest checkpoint or `initial`; return the exit code."""
        config, workdir, total = self._config, self._files.workdir, self._config.total_steps
        start = self._checkpoints.latest_step
        if start is not None and start >= total:
            print(f"{workdir} is finished: {start} of {total} steps; nothing to do")
            return 0
        state = self._first_state(start, initial)
        self._check_labels(state)
        self._speed = metrics.Speed(
            int(state.step),
            total,
            audio_seconds=config.batch_size * config.data.num_samples / SAMPLE_RATE,
            flops=self._flops,
        )
        self._log = run_log.RunLog(
            self._files.folder,
            self._sources["train"],
            streak=config.guard.streak,
            max_faulty=config.data.max_faulty,
            tensorboard=config.tensorboard,
            step=int(state.step),
            batch=int(state.batch),
            first=jax.process_index() == 0,
        )
        saves = config.checkpoint
        intervals = loop.Intervals(
            total, config.log_every, config.eval_every, saves.every_steps, saves.every_minutes
        )
        # a checkpoint counts on the metrics of all its steps: flush them first
        saver = loop.Saver(
            self._checkpoints, intervals, self._clock, self._speed, self._files.flush
        )
        if start is None:  # so that there is always a checkpoint to go back to
            saver.save(0, state)
        state, request = loop.run(
            self,
            state,
            intervals,
            saver=saver,
            clock=self._clock,
            speed=self._speed,
            log=self._log,
            publish=self._publish,
            beat=self._beat,
        )
        return self._end(int(state.step), request)

    def _first_state(
        self, start: int | None, initial: init_from.InitialWeights | None
    ) -> TrainState:
        experiment = self._experiment
        if start is None:
            state = experiment.init()
            return init_from.apply_initial_weights(state, initial) if initial else state
        with self._clock.time_of("restore"):
            state = self._checkpoints.restore(experiment.abstract, experiment.shardings)
        at = f"step {int(state.step)} of {self._config.total_steps}"
        print(f"resuming {self._files.workdir} at {at}", flush=True)
        return state

    def _check_labels(self, state: TrainState) -> None:
        """Print the perplexity of each dataset's codes; release the workdir if they are useless."""
        directories = mix.dataset_directories(self._config)
        try:
            with self._clock.time_of("compile"):
                first_sums = self._validation.first(state.params)
                for directory, sums in zip(directories, first_sums, strict=True):
                    print(*build.check_labels(self._config, sums, directory), sep="\n", flush=True)
        except UserError:
            workdir_lock.release_workdir(self._files.folder)
            raise

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

    def batches(self, position: int) -> Iterator[Any]:
        """Return the global batches from number `position` on."""
        return self._loader.train(position)

    def update(self, state: TrainState, batch: Any, request: int) -> tuple[TrainState, Any]:
        """Make one update; every host's `request` travels with the batch."""
        batch["requests"] = sharding.each_host(request, self._mesh)
        return self._experiment.train_step(state, self._teacher_params, batch, self._key)

    def decide(self, step: int, batch: int, result: Any, last: bool) -> run_log.StepDecision:
        """Judge the steps so far by the run's log."""
        return self._log.decide(step, batch, result, last)

    def may_save(self, result: Any) -> bool:
        """Return False within a streak of rejected steps."""
        return not int(result["guard"].streak)

    def roll_back(self, state: TrainState, streak: bad_steps.BadStreak) -> TrainState:
        """Return the state of the newest checkpoint before `streak`, past its batches.

        Raises UserError after the last rollback that the config allows.
        """
        guard, rollbacks = self._config.guard, int(state.guard.rollbacks)
        if rollbacks >= guard.rollbacks:
            raise UserError(
                f"{guard.streak} updates in a row were rejected, the first at step "
                f"{streak.first_step}, after going back {rollbacks} times (guard.rollbacks): see "
                f"{self._files.workdir}/{bad_steps.FILE}. Lower optimizer.peak_learning_rate or "
                "optimizer.clip_norm, in a new workdir"
            )
        experiment = self._experiment
        with self._clock.time_of("restore"):
            earlier = self._checkpoints.restore(
                experiment.abstract, experiment.shardings, streak.first_step
            )
        self._checkpoints.forget(above=int(earlier.step))
        print(
            f"{guard.streak} bad steps in a row: going back to step {int(earlier.step)}, "
            f"and on with batch {streak.next_batch}",
            flush=True,
        )
        self._clock.went_back()
        return step.redirect(earlier, streak.next_batch, rollbacks + 1)

    def row(self, step: int, state: TrainState, result: Any, evaluate: bool) -> loop.Row:
        """Return the row of metrics.jsonl, with the validation splits' on request."""
        row = {"step": step, **metrics.reduce(result["sums"])}
        row["grad_norm"] = float(result["grad_norm"])
        row["learning_rate"] = float(self._learning_rate(int(result["updates"])))
        row["looped_clips"] = int(result["looped"])
        row["skipped_steps"] = int(result["guard"].skipped)
        row |= self._speed.measure(step)
        if evaluate:
            with self._clock.time_of("validation"):
                row |= self._validation.row(state.params)
            self._speed.pause()
        return row

    def line(self, row: loop.Row, eta: str) -> str:
        """Return the console's line of a row."""
        return metrics.console_line(row, self._config.total_steps, eta)
