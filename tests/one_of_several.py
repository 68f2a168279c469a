"""One process of a distributed run without a model: `python -m tests.one_of_several --what=...`.

It connects to the others, makes global batches from a source that records what is read, prints its
observations as a line of JSON on standard error, and ends in one of several ways.
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
from absl import flags

from mert_jax import cli, sharding
from mert_jax.checkpoints import manager
from mert_jax.data import pipeline
from mert_jax.errors import UserError
from mert_jax.runtime import distributed

WHAT = flags.DEFINE_string("what", "read", "read, or how process 1 ends: kill, mistake, bug, stop")
MESH = flags.DEFINE_list("mesh", ["-1", "1", "1"], "Over data, fsdp, tensor.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where a checkpoint is saved and restored.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "As for training.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "As for training.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "As for training.")
SECONDS = flags.DEFINE_float("connect_seconds", 60, "As for training.")
BATCH, SAMPLES = 24, 640


class Source(list):
    """Records that hold their own number, with a list of those read."""

    def __init__(self, number: int):
        waves = (np.full(SAMPLES, i, np.int16) for i in range(number))
        super().__init__({"audio": wave, "codes": {}} for wave in waves)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


def main():
    named = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    with distributed.connect(distributed.find_cluster(*named, SECONDS.value), SECONDS.value):
        mesh = sharding.make_mesh(*map(int, MESH.value))
        rows = sharding.rows_of_host(BATCH, mesh)
        source = Source(40)
        options = dict(num_samples=SAMPLES, batch_size=BATCH, seed=3, threads=0)
        own = next(pipeline.train_stream([source], rows=rows, **options))
        whole = next(pipeline.train_stream([Source(40)], **options))
        with jax.set_mesh(mesh):
            batch = sharding.global_batch(own["audio"], BATCH, mesh)
            request = sharding.each_host(10 + PROCESS_ID.value, mesh)
            everywhere = jax.jit(lambda *x: x, out_shardings=sharding.replicated(mesh))
            batch, request = map(np.asarray, everywhere(batch, request))
        said = dict(
            rows=rows.tolist(),
            read=sorted(set(source.read)),
            expected=sorted(own["record"].tolist()),
            same=bool((batch == whole["audio"]).all()),
            request=int(request.max()),
        )
        if WORKDIR.value:
            said["restored"] = save_and_restore(mesh)
        print("SAID " + json.dumps(said), file=sys.stderr, flush=True)
        print("only the first process prints this", flush=True)
        if WHAT.value != "read":
            end_while_the_others_wait(everywhere, mesh)


def save_and_restore(mesh) -> bool:
    """Save a sharded state from all processes; return whether it is restored unchanged."""
    kept = manager.Checkpoints(WORKDIR.value, keep=2)
    layout = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    state = {"step": sharding.placed(np.int32(5), sharding.replicated(mesh))}
    state |= {"x": sharding.placed(np.arange(64.0, dtype=np.float32), layout)}
    if kept.latest_step is None:
        kept.save(5, state)
    found = kept.restore(state, jax.tree.map(lambda x: x.sharding, state))
    kept.close()
    same = jax.jit(lambda a, b: (a["x"] == b["x"]).all() & (a["step"] == b["step"]))
    return bool(same(found, state))


def end_while_the_others_wait(everywhere, mesh):
    for step in range(1000):
        if PROCESS_ID.value == 1 and step == 3:
            if WHAT.value == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if WHAT.value == "stop":
                time.sleep(600)
            if WHAT.value == "mistake":
                raise UserError("there is no such folder on this host")
            raise ZeroDivisionError("a bug")
        np.asarray(everywhere(sharding.each_host(step, mesh))[0])


if __name__ == "__main__":
    cli.run(main)
