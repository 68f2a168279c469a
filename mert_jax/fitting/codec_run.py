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
from mert_jax.files import Row
from mert_jax.fitting import codec_report, codec_step
from mert_jax.fitting.codec_step import Codec, CodecState
from mert_jax.pretraining import loop, metrics
from mert_jax.pretraining.run_log import StepDecision
from mert_jax.runtime import goodput, workdir_lock
from mert_jax.teachers import encodec_checkpoint


def get_config() -> ConfigDict:
    """Return the settings of the full-size codec, with 64 clips of 1 s an update."""
    settings = dataclasses.asdict(Codec()) | dict(batch_size=64, num_samples=24_000, threads=4)
    checkpoint = dict(every_steps=0, every_minutes=10.0, keep=2)
    return ConfigDict(settings | dict(log_every=50, eval_every=1000, checkpoint=checkpoint))


def run(config: ConfigDict, data_dir: str, output: str, seed: int) -> int:
    """Train to `total_steps`, write the codec to `output`, and return the exit code.

    Run again, it resumes from output/training. Raises UserError for settings that do not fit.
    """
    for name in ("total_steps", "batch_size", "log_every", "eval_every", "filters", "books"):
        if config[name] < 1:
            raise UserError(f"--config.{name}={config[name]}; it must be at least 1")
    metadata, length = records.metadata(data_dir), config.num_samples
    longest = metadata["overlap_samples"]
    if not 4096 <= length <= longest or length % HOP_LENGTH:
        allowed = f"a multiple of {HOP_LENGTH} from 4160 to {longest}, the clips of {data_dir}"
        raise UserError(f"--config.num_samples={length}; set {allowed} (prepare --crop_seconds)")
    source, validation = (records.open_source(data_dir, x) for x in ("train", "validation"))
    held_out = codec_report.held_out_clips(validation, longest // HOP_LENGTH * HOP_LENGTH)
    trainer = CodecTraining(config, source, held_out, seed)
    training = os.path.join(output, "training")
    settings = config.to_dict() | {"seed": seed, "fingerprint": metadata["fingerprint"]}
    resumes = bool(manager.checkpoint_steps(training))
    lock = workdir_lock.lock_workdir(training, settings, resumes)
    with lock, jax.set_mesh(trainer.mesh):
        state, request = trainer.train(training)
        if request:
            print(f"stopped and saved at step {state.step}; run the same command to go on")
            return 128 + request
        codebooks = codec_step.codebooks(state.quantizer)
        params = jax.device_get(state.params | {"codebooks": codebooks})
        encodec_checkpoint.write_encodec(output, params)
        codec_report.report(output, trainer.codec, state, held_out)
    return 0


class CodecTraining:
    """The training of a codec, as a `loop.Trainer`: on one host, without a guard."""

    def __init__(self, config: ConfigDict, source: Any, held_out: np.ndarray, seed: int):
        self.codec = Codec(**{x.name: config[x.name] for x in dataclasses.fields(Codec)})
        self._config, self._source, self._held_out = config, source, held_out
        self._seed, self._key, self._request = seed, jax.random.key(seed + 1), 0
        self.mesh = sharding.make_mesh(-1, 1, 1)
        sharding.check_batch(config.batch_size, self.mesh)

    def train(self, training: str) -> tuple[CodecState, int]:
        """Train in the workdir `training`; return the last state, and the signal or 0."""
        config, saves = self._config, self._config.checkpoint
        init = functools.partial(codec_step.init, self.codec, jax.random.key(self._seed))
        shardings = sharding.state_shardings(init, self.mesh)
        step = functools.partial(codec_step.train_step, codec=self.codec)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        steps = config.total_steps, config.log_every, config.eval_every
        intervals = loop.Intervals(*steps, saves.every_steps, saves.every_minutes)
        with contextlib.closing(manager.Checkpoints(training, saves.keep)) as checkpoints:
            if start := checkpoints.latest_step or 0:
                state = checkpoints.restore(jax.eval_shape(init), shardings)
                print(f"resuming {training} at step {start} of {config.total_steps}", flush=True)
            else:
                state = jax.jit(init, out_shardings=shardings)()
            seconds = config.batch_size * config.num_samples / SAMPLE_RATE
            speed = metrics.Speed(start, config.total_steps, audio_seconds=seconds, flops=0)
            self._speed, clock = speed, goodput.Goodput(training)
            saver = loop.Saver(checkpoints, intervals, clock, speed, before=lambda: None)
            writer = metrics.Writer(training, start, tensorboard=False)
            return loop.run(
                self, state, intervals, saver, clock, speed, writer, clock.write, lambda: None
            )

    def next_batch(self, state: CodecState) -> int:
        return int(state.step)

    def batches(self, start: int) -> Iterator[jax.Array]:
        """Return the batches of int16 clips [B, N] from number `start` on."""
        config = self._config
        stream = pipeline.train_stream(
            [self._source],
            num_samples=config.num_samples,
            batch_size=config.batch_size,
            seed=self._seed,
            start=start,
            threads=config.threads,
        )
        bad = bad_records.BadRecords(None, [self._source], start=start)

        def put(batch: Any) -> jax.Array:
            return sharding.global_batch(batch["audio"], config.batch_size, self.mesh)

        return pipeline.prefetch(bad_records.count_bad_records(stream, bad, start), put)

    def update(self, state: CodecState, batch: jax.Array, request: int) -> tuple[CodecState, Any]:
        self._request = request
        return self._step(state, batch, self._key)

    def decide(self, step: int, batch: int, result: Any, last: bool) -> StepDecision:
        return StepDecision(None, self._request)

    def may_save(self, result: Any) -> bool:
        return True

    def row(self, step: int, state: CodecState, result: Any, evaluate: bool) -> Row:
        """Return the row of metrics.jsonl. Raises UserError if the loss is no longer finite."""
        row = {"step": step, **{name: np.asarray(x).tolist() for name, x in result.items()}}
        if not np.isfinite(row["loss"] + row["grad_norm"]):
            problem = f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {step}"
            raise UserError(f"{problem}; lower --config.learning_rate, in a new --output")
        name = "audio_seconds_per_second"
        row[name] = self._speed.measure(step)[name]
        if evaluate:
            books = codec_step.codebooks(state.quantizer)
            figures, _ = codec_report.evaluate(self.codec, state.params, books, self._held_out)
            row |= {f"validation_{name}": value for name, value in figures.items()}
            self._speed.pause()
        return row

    def line(self, row: Row, eta: str) -> str:
        line = (
            f"step {row['step']}/{self.codec.total_steps}  loss {row['loss']:.3f} = log-mel "
            f"{row['mel_distance']:.3f} + wave {row['wave_distance']:.4f} x "
            f"{self.codec.wave_weight:g} + commitment {row['commitment']:.5f}  revived "
            f"{sum(row['dead'])}  {row['audio_seconds_per_second']:.0f} s/s  eta {eta}"
        )
        if "validation_mel_distance" in row:
            mel, sdr = row["validation_mel_distance"], row["validation_si_sdr"]
            line += f"\n  validation: log-mel distance {mel:.3f}, SI-SDR {sdr:.2f} dB"
        return line
