"""Training our own codec: the loop, its figures, and the codec written in EnCodec's format."""

import functools
import inspect
import os
import time
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
from mert_jax.pretraining import metrics
from mert_jax.runtime import workdir_lock
from mert_jax.runtime.signals import StopSignal
from mert_jax.teachers import encodec_checkpoint


def get_config() -> ConfigDict:
    """The full-size codec: EnCodec's 24 kHz encoder and decoder, 8 codebooks of 1024 (arXiv
    2210.13438, sections 3.2 and 4.5), 64 clips of 1 s an update."""
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
            wave_weight=10.0,  # of the waveform's distance beside that of log-mel spectra
            commitment=0.25,
            decay=0.99,  # of the codebooks' moving averages
            dead_below=0.1,  # of the average use of a code: less often, and it is set anew
            threads=4,
            log_every=50,
            eval_every=1000,
            checkpoint=dict(every_steps=0, every_minutes=10.0, keep=2),
        )
    )


def run(config: ConfigDict, data_dir: str, output: str, seed: int) -> int:
    """Train to `total_steps`, write the codec to `output`, and return the exit code.

    Run again, it resumes from output/training. Raises UserError for numbers that do not go
    together, another run's output, and data that cannot be read.
    """
    for name in ("total_steps", "batch_size", "log_every", "eval_every", "filters", "books"):
        if config[name] < 1:
            raise UserError(f"--config.{name}={config[name]}; it must be at least 1")
    if config.num_samples < 4096 or config.num_samples % HOP_LENGTH:
        raise UserError(
            f"--config.num_samples={config.num_samples}; it must be a multiple of "
            f"{HOP_LENGTH} and at least 4160"
        )
    overlap = records.metadata(data_dir)["overlap_samples"]
    if config.num_samples > overlap:
        raise UserError(
            f"--config.num_samples={config.num_samples}, and {data_dir} was prepared for clips of "
            f"{overlap} at most"
        )
    source = records.open_source(data_dir, "train")
    validation = records.open_source(data_dir, "validation")
    mesh = sharding.make_mesh(-1, 1, 1)
    sharding.check_batch(config.batch_size, mesh)
    training = os.path.join(output, "training")
    fingerprint = records.metadata(data_dir)["fingerprint"]
    settings = config.to_dict() | {"seed": seed, "fingerprint": fingerprint}
    held = workdir_lock.lock_workdir(
        training, settings, begun=bool(manager.checkpoint_steps(training))
    )
    options = inspect.signature(codec_step.make).parameters
    c = codec_step.make(**{name: config[name] for name in options})
    clips = dict(num_samples=overlap // HOP_LENGTH * HOP_LENGTH)
    held_out = codec_report.held_out_clips(validation, **clips)
    with held, jax.set_mesh(mesh):
        state, code = train(config, training, c, source, held_out, mesh, seed)
        if code:
            return code
        params = jax.device_get(state.params | {"codebooks": codec_step.codebooks(state.quantizer)})
        encodec_checkpoint.write_encodec(output, params)
        codec_report.report(output, training, c, state, held_out)
    return 0


def train(
    config: ConfigDict,
    training: str,
    c: Codec,
    source: Any,
    held_out: np.ndarray,
    mesh: Any,
    seed: int,
) -> tuple[CodecState, int]:
    """The loop over batches; the last state and the exit code, 0 when `total_steps` are done."""
    init = functools.partial(codec_step.init, c, jax.random.key(seed))
    shardings = sharding.state_shardings(init, mesh)
    checkpoints = manager.Checkpoints(training, config.checkpoint.keep)
    start = checkpoints.latest_step or 0
    if start:
        state = checkpoints.restore(jax.eval_shape(init), shardings)
        print(f"resuming {training} at step {start} of {config.total_steps}", flush=True)
    else:
        state = jax.jit(init, out_shardings=shardings)()
    if start >= config.total_steps:
        checkpoints.close()
        return state, 0
    step = jax.jit(
        functools.partial(codec_step.train_step, c=c),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    stream = pipeline.train_stream(
        [source],
        num_samples=config.num_samples,
        hop=HOP_LENGTH,
        batch_size=config.batch_size,
        seed=seed,
        start=start,
        threads=config.threads,
    )
    stream = bad_records.count_bad_records(
        stream, bad_records.BadRecords(None, [source], start=start), start
    )
    put = lambda batch: sharding.global_batch(batch["audio"], config.batch_size, mesh)
    key = jax.random.key(seed + 1)
    policy = manager.SavePolicy(
        config.checkpoint.every_steps, config.checkpoint.every_minutes, time.monotonic
    )
    seconds = config.batch_size * config.num_samples / SAMPLE_RATE
    speed = metrics.Speed(start, config.total_steps, audio_seconds=seconds, flops=0)
    writer = metrics.Writer(training, start, tensorboard=False)
    stop = StopSignal()
    for number, audio in enumerate(pipeline.prefetch(stream, put), start + 1):
        state, found = step(state, audio, key)
        last = number == config.total_steps or stop.signal
        evaluate_now = number % config.eval_every == 0 or number == config.total_steps
        if number % config.log_every == 0 or evaluate_now:
            row = {"step": number, **{k: np.asarray(v).tolist() for k, v in found.items()}}
            if not np.isfinite(row["loss"] + row["grad_norm"]):
                checkpoints.close()
                raise UserError(
                    f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {number}: "
                    f"stopped; the last checkpoint is of step {checkpoints.latest_step}. Lower "
                    "--config.learning_rate, in a new --output"
                )
            rate = speed.measure(number)["audio_seconds_per_second"]
            row["audio_seconds_per_second"] = rate
            line = (
                f"step {number}/{config.total_steps}  loss {row['loss']:.3f} = log-mel "
                f"{row['mel_distance']:.3f} + wave {row['wave_distance']:.4f} x "
                f"{config.wave_weight:g} + commitment {row['commitment']:.5f}  revived "
                f"{sum(row['dead'])}  {rate:.0f} s/s  eta {speed.eta(number)}"
            )
            if evaluate_now:
                row |= {
                    f"validation_{name}": value
                    for name, value in codec_report.evaluate(c, state, held_out)["trained"].items()
                }
                line += (
                    f"\n  validation: log-mel distance {row['validation_mel_distance']:.3f}, "
                    f"SI-SDR {row['validation_si_sdr']:.2f} dB"
                )
                speed.pause()
            writer.write(row)
            print(line, flush=True)
        if policy.due(number, policy.overdue) or last:
            checkpoints.save(number, state)
            policy.saved()
        if last:
            break
    stream.close()
    checkpoints.close()
    writer.close()
    if stop.signal and number < config.total_steps:
        print(f"stopped and saved at step {number}; run the same command to go on", flush=True)
        return state, 128 + stop.signal
    return state, 0
