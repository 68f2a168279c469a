"""The training step of a config, compiled for devices that need not be present."""

import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.constants import HOP_LENGTH
from mert_jax.data.stored_codes import CodesInfo
from mert_jax.errors import UserError
from mert_jax.hardware import TPUS, Chip
from mert_jax.models import mert_v1
from mert_jax.planning import abstract_teachers
from mert_jax.pretraining import build


class Topology(NamedTuple):
    """The devices of a topology and their kind, None for CPUs."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


class Compiled(NamedTuple):
    """A compiled step; one that does not fit has `used`, the bytes it needs, but no `memory`."""

    text: str
    memory: Any
    used: float
    seconds: float
    mesh: Mesh
    student: mert_v1.Student
    batch: Mapping[str, Any]


def make_topology(name: str) -> Topology:
    """Return the devices of "v5e:4x4" or, fake ones, "cpu:8"; call before jax's backend starts."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", name)
    if not match or match[1] not in (*TPUS, "cpu"):
        needed = f"{', '.join(TPUS)} and a shape, such as v5e:4x4 or v4:2x2x4, or cpu:8"
        raise UserError(f"--topology={name!r} is unknown; it is {needed}")
    number = math.prod(int(n) for n in match[2].split("x"))
    jax.config.update("jax_platforms", "cpu")  # leave a TPU of this machine alone
    if match[1] != "cpu":
        chip = TPUS[match[1]]
        return Topology(name, _tpu_devices(name, chip, number), chip)
    flag = f"--xla_force_host_platform_device_count={number}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    devices = jax.devices("cpu")
    if not 1 <= number <= len(devices):
        raise UserError(f"--topology={name}: give cpu:1 to cpu:{len(devices)}, which jax has here")
    return Topology(name, devices[:number], None)


def _tpu_devices(name: str, chip: Chip, number: int) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        how = "pip install -e .[plan] (libtpu, 137 MB; no TPU is needed)"
        raise UserError(f"--topology={name} needs the TPU compiler: {how}")
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is taken, so other programs may plan too
        # without these, libtpu asks Cloud's metadata server which machine this is
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{number * chip.cores}",
    )
    from jax.experimental import topologies  # reads the environment

    options = {}
    if chip.cores > 1:  # one device a chip, as jax on a TPU VM has it
        options["chip_config_name"] = "megacore"
    elif name.endswith(":2x4"):  # the one slice of v5e and v6e that is a host of eight chips
        options["chips_per_host_bounds"] = (2, 4, 1)
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as e:  # libtpu raises any of them
        reason = f"is not a slice that libtpu knows ({str(e).splitlines()[0].rstrip('.')})"
        shapes = "Cloud TPU's documentation lists the shapes, such as v5e:4x4, v4:2x2x4"
        raise UserError(f"--topology={name!r} {reason}; {shapes}") from e


def compile_step(config: ConfigDict, devices: Sequence[Any], codes: str = "") -> Compiled:
    """Compile the training step of a checked `config`; codes: as in `stored_codes`."""
    mesh = build.make_mesh(config, devices)
    stored = abstract_teachers.stored_codes(config, codes)
    teachers = abstract_teachers.make(config, stored)
    student = build.make_student(config, teachers, stored)
    experiment = build.make_experiment(config, student, teachers, mesh)
    layouts, everywhere = experiment.shardings, sharding.replicated(mesh)
    state = jax.tree.map(lambda x, at: x.update(sharding=at), experiment.abstract, layouts)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        {name: teacher.params for name, teacher in teachers.items()},
    )
    batch = _abstract_batch(config, experiment.objective.longest_context, stored, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    start = time.monotonic()
    text, memory, used = "", None, 0.0
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        lowered = experiment.train_step.lower(state, params, batch, key)
        try:
            program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            # `as_text` cannot read parts on the sparse cores of v5p and v6e (jax 0.11)
            dumps = sorted(Path(folder).glob("*.after_codegen.txt"), key=os.path.getsize)
            text = dumps[-1].read_text() if dumps else program.as_text()
            memory = program.memory_analysis()
        except jax.errors.JaxRuntimeError as e:
            if not (used := _used_hbm(str(e))):
                raise
    return Compiled(text, memory, used, time.monotonic() - start, mesh, student, batch)


def _used_hbm(error: str) -> float:
    """Return the bytes needed by a program that the compiler refused, 0 for another error."""
    match = re.search(r"(?:required for [^()]*\(|Used )([\d.]+)([KMGT]?)\b.*HBM", error, re.I)
    return float(match[1]) * 1024.0 ** " KMGT".index(match[2] or " ") if match else 0.0


def _abstract_batch(
    config: ConfigDict, context: int, stored: Mapping[str, CodesInfo], mesh: Mesh
) -> dict[str, Any]:
    """Return the shapes of a global batch, as `train` makes it, and its layout on the mesh."""
    rows, samples = config.batch_size, config.data.num_samples
    frames = -(-samples // HOP_LENGTH)

    def array(shape: tuple[int, ...], dtype: Any, axes: PartitionSpec = sharding.BATCH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))

    return {
        "audio": array((rows, context + samples), jnp.int16),
        "looped": array((rows,), jnp.bool_),
        "record": array((rows,), jnp.int32),
        "faulty": array((rows,), jnp.int32),
        "requests": array((mesh.size,), jnp.int32, PartitionSpec(sharding.AXES)),
        "codes": {k: array((rows, frames, x.books), jnp.uint16) for k, x in stored.items()},
    }
