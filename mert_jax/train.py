"""Pretrain a student: `python -m mert_jax.train --config=configs/base.py --workdir=DIR`.

Weights are those of WORKDIR's newest intact checkpoint, else of the config's `init_from`, or new.
"""

from absl import flags

from mert_jax import cli
from mert_jax.pretraining import build
from mert_jax.pretraining.run import pretrain
from mert_jax.runtime import distributed

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)

_CONFIG = define.config_file("config", None, "Recipe, such as configs/base.py.")
_WORKDIR = define.string("workdir", None, "Where checkpoints and metrics go.")
_DESCRIBE = define.bool("describe", False, "Print every parameter and exit.")
_COORDINATOR = define.string("coordinator", None, "HOST:PORT of process 0; not on TPU or Slurm.")
_NUM_PROCESSES = define.integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS_ID = define.integer("process_id", None, "Number of this process, from 0.")
_CONNECT_SECONDS = define.float("connect_seconds", 300.0, "How long to wait for the processes.")


def main() -> int:
    config = build.check(cli.config_of(_CONFIG))
    timeout = _CONNECT_SECONDS.value
    processes = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    cluster = distributed.find_cluster(*processes, timeout)
    with distributed.connect(cluster, timeout):
        return pretrain(config, _WORKDIR.value, _DESCRIBE.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
