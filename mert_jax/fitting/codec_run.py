"""Training a codec of your own: settings, loop, and the result in EnCodec's format."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.checkpoints import manager
from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import bad_records, pipeline, records
from mert_jax.errors import UserError
from mert_jax.fitting import codec_report, codec_step
from mert_jax.fitting.codec_step import Codec, CodecState
from mert_jax.pretraining import loop, metrics
from mert_jax.pretraining.run_log import StepDecision
from mert_jax.runtime import goodput, workdir_lock
from mert_jax.teachers import encodec_checkpoint


def get_config() -> ConfigDict:
    """Return the settings of the full-size codec, EnCodec's 24 kHz encoder and decoder.

    8 codebooks of 1024 (arXiv 2210.13438, sections 3.2 and 4.5), 64 clips of 1 s an update.
    """
    return ConfigDict(
        dict(
            filters=32,  # channels of the first convolution; the LSTM has 16 times as many
            dim=128,
            books=8,
            size=1024,
            total_steps=200_000,
            batch_size=64,
            num_samples=24_000,
            learning_rate=3e-4,
            clip_norm=1.0,
            wave_weight=10.0,  # of the waveform distance; that of the log-mel distance is 1
            commitment=0.25,
            decay=0.99,  # of the codebooks' moving averages
            dead_below=0.1,  # codes used less than this fraction of the average are moved
            threads=4,
            log_every=50,
            eval_every=1000,
            checkpoint=dict(every_steps=0, every_minutes=10.0, keep=2),
        )
    )


def run(config: ConfigDict, data_dir: str, output: str, seed: int) -> int:
    """Train to `total_steps`, write the codec to `output`, and return the exit code.

    Run again, it resumes from output/training. Raises UserError for numbers that do not fit
    together, the output of another run, and data that cannot be read.
    """
    check(config, data_dir)
    metadata = records.metadata(data_dir)
    source = records.open_source(data_dir, "train")
    validation = records.open_source(data_dir, "validation")
    num_samples = metadata["overlap_samples"] // HOP_LENGTH * HOP_LENGTH
    held_out = codec_report.held_out_clips(validation, num_samples)
    trainer = CodecTraining(config, source, held_out, seed)
    training = os.path.join(output, "training")
    settings = config.to_dict() | {"seed": seed, "fingerprint": metadata["fingerprint"]}
    resumes = bool(manager.checkpoint_steps(training))
    lock = workdir_lock.lock_workdir(training, settings, begun=resumes)
    with lock, jax.set_mesh(trainer.mesh):
        state, request = trainer.train(training)
        if request:
            return 128 + request
        codebooks = codec_step.codebooks(state.quantizer)
        params = jax.device_get(state.params | {"codebooks": codebooks})
        encodec_checkpoint.write_encodec(output, params)
        codec_report.report(output, training, trainer.codec, state, held_out)
    return 0


def check(config: ConfigDict, data_dir: str) -> None:
    """Raise UserError for numbers that do not fit together, or do not fit the dataset."""
    for name in ("total_steps", "batch_size", "log_every", "eval_every", "filters", "books"):
        if config[name] < 1:
            raise UserError(f"--config.{name}={config[name]}; it must be at least 1")
    num_samples, overlap = config.num_samples, records.metadata(data_dir)["overlap_samples"]
    if num_samples < 4096 or num_samples % HOP_LENGTH:
        raise UserError(
            f"--config.num_samples={num_samples}; it must be a multiple of {HOP_LENGTH} and at "
            "least 4160"
        )
    if num_samples > overlap:
        raise UserError(
            f"--config.num_samples={num_samples}, but {data_dir} was prepared for clips of at most "
            f"{overlap}; lower it, or prepare with a longer --crop_seconds"
        )


class CodecTraining:
    """The training of a codec, as a `loop.Trainer`."""

    def __init__(self, config: ConfigDict, source: Any, held_out: np.ndarray, seed: int):
        names = [field.name for field in dataclasses.fields(Codec)]
        self.codec = Codec(**{name: config[name] for name in names})
        self._config, self._source, self._held_out = config, source, held_out
        self._seed, self._key, self._request = seed, jax.random.key(seed + 1), 0
        self.mesh = sharding.make_mesh(-1, 1, 1)
        sharding.check_batch(config.batch_size, self.mesh)

    def train(self, training: str) -> tuple[CodecState, int]:
        """Train in the workdir `training`; return the last state, and the signal or 0."""
        config, saves = self._config, self._config.checkpoint
        init = functools.partial(codec_step.init, self.codec, jax.random.key(self._seed))
        shardings = sharding.state_shardings(init, self.mesh)
        steps = config.total_steps, config.log_every, config.eval_every
        intervals = loop.Intervals(*steps, saves.every_steps, saves.every_minutes)
        with contextlib.closing(manager.Checkpoints(training, saves.keep)) as checkpoints:
            start = checkpoints.latest_step or 0
            if start:
                state = checkpoints.restore(jax.eval_shape(init), shardings)
                print(f"resuming {training} at step {start} of {config.total_steps}", flush=True)
            else:
                state = jax.jit(init, out_shardings=shardings)()
            if start >= config.total_steps:
                return state, 0
            step = functools.partial(codec_step.train_step, codec=self.codec)
            self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
            seconds = config.batch_size * config.num_samples / SAMPLE_RATE
            self._speed = metrics.Speed(start, config.total_steps, audio_seconds=seconds, flops=0)
            self._checkpoints = checkpoints
            clock = goodput.Goodput(training)
            state, request = loop.run(
                self,
                state,
                intervals,
                saver=loop.Saver(checkpoints, intervals, clock, self._speed, lambda: None),
                clock=clock,
                speed=self._speed,
                log=metrics.Writer(training, start, tensorboard=False),
                publish=clock.write,
                beat=lambda: None,
            )
        if request:
            print(f"stopped and saved at step {state.step}; run the same command to go on")
        return state, request

    def position(self, state: CodecState) -> int:
        """Return the number of the next batch, which is that of the updates so far."""
        return int(state.step)

    def batches(self, position: int) -> Iterator[jax.Array]:
        """Return the batches of int16 clips [B, N] from number `position` on."""
        config = self._config
        stream = pipeline.train_stream(
            [self._source],
            num_samples=config.num_samples,
            batch_size=config.batch_size,
            seed=self._seed,
            start=position,
            threads=config.threads,
        )
        bad = bad_records.BadRecords(None, [self._source], start=position)

        def put(batch: Any) -> jax.Array:
            return sharding.global_batch(batch["audio"], config.batch_size, self.mesh)

        return pipeline.prefetch(bad_records.count_bad_records(stream, bad, position), put)

    def update(self, state: CodecState, batch: jax.Array, request: int) -> tuple[CodecState, Any]:
        """Make one update, and remember the request for `decide`: there is only one host."""
        self._request = request
        return self._step(state, batch, self._key)

    def decide(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        """Return the request; this training has no guard that rolls it back."""
        return StepDecision(None, self._request)

    def may_save(self, result: Any) -> bool:
        """Return True: every state may be saved."""
        return True

    def row(self, step: int, state: CodecState, result: Any, evaluate: bool) -> loop.Row:
        """Return the row of metrics.jsonl. Raises UserError if the loss is no longer finite."""
        row = {"step": step, **{name: np.asarray(x).tolist() for name, x in result.items()}}
        if not np.isfinite(row["loss"] + row["grad_norm"]):
            raise UserError(
                f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {step}: "
                f"stopped; the last checkpoint is of step {self._checkpoints.latest_step}. Lower "
                "--config.learning_rate, in a new --output"
            )
        rate = self._speed.measure(step)["audio_seconds_per_second"]
        row["audio_seconds_per_second"] = rate
        if evaluate:
            figures = codec_report.evaluate(self.codec, state, self._held_out)["trained"]
            row |= {f"validation_{name}": value for name, value in figures.items()}
            self._speed.pause()
        return row

    def line(self, row: loop.Row, eta: str) -> str:
        """Return the console line of a row."""
        line = (
            f"step {row['step']}/{self._config.total_steps}  loss {row['loss']:.3f} = log-mel "
            f"{row['mel_distance']:.3f} + wave {row['wave_distance']:.4f} x "
            f"{self._config.wave_weight:g} + commitment {row['commitment']:.5f}  revived "
            f"{sum(row['dead'])}  {row['audio_seconds_per_second']:.0f} s/s  eta {eta}"
        )
        if "validation_mel_distance" in row:
            line += (
                f"\n  validation: log-mel distance {row['validation_mel_distance']:.3f}, "
                f"SI-SDR {row['validation_si_sdr']:.2f} dB"
            )
        return line
