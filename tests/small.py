"""A student of a few thousand parameters with both kinds of teachers, for tests that train."""

from ml_collections import ConfigDict

from configs import tiny

SMALL = {
    "total_steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 3,
    "group": 2,
    "data.num_samples": 16_000,
    "checkpoint.every_steps": 3,
    "objective.mixture_length": (1_600, 3_200),
    "objective.unmasked_weight": 0.0,
    "model.conv_dim": 16,
    "model.hidden_size": 32,
    "model.num_heads": 8,
    "model.intermediate_size": 64,
    "model.final_dim": 8,
    "model.pos_conv_kernel": 16,
    "optimizer.peak_learning_rate": 2e-3,
    "teacher.random_projection.books": 2,
    "teacher.random_projection.size": 64,
    "teacher.random_projection.n_fft": 2048,
    "teacher.cqt.fmin": 220.0,
    "teacher.cqt.n_bins": 12,
    "teacher.cqt.bins_per_octave": 12,
    "optimizer.warmup_steps": 2,
}


def config(**overrides) -> ConfigDict:
    """Return a smaller tiny.py; overrides are dotted keys with "__" for the dot."""
    config = tiny.get_config()
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config.update_from_flattened_dict(SMALL | dotted)
    return config


def command_line() -> list[str]:
    """Return the same settings as flags to follow --config=configs/tiny.py."""
    return [f"--config.{key}={value}" for key, value in SMALL.items()]
