"""Pretrain a student: `python -m mert_jax.train --config=configs/base.py --workdir=DIR`.

Weights come from WORKDIR's newest intact checkpoint, else from the config's `init_from`, else from
initialisation.
"""

from absl import flags
from ml_collections import config_flags

from mert_jax import cli
from mert_jax.pretraining import build
from mert_jax.pretraining.run import pretrain
from mert_jax.runtime import distributed

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
    """Train to `total_steps` and return the exit code."""
    config = build.check(cli.config_of(_CONFIG))
    timeout = _CONNECT_SECONDS.value
    cluster = distributed.find_cluster(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout
    )
    with distributed.connect(cluster, timeout):
        return pretrain(config, _WORKDIR.value, _DESCRIBE.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
