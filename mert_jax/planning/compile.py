"""A config's real training step, compiled for devices that need not be there."""

import functools
import glob
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.constants import HOP_LENGTH
from mert_jax.data import stored_codes
from mert_jax.errors import UserError
from mert_jax.hardware import TPUS, Chip
from mert_jax.models import mert_v1
from mert_jax.planning import abstract_teachers
from mert_jax.pretraining import build


class Topology(NamedTuple):
    """The devices of a topology, and what they are (None: CPUs)."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


class Compiled(NamedTuple):
    """A compiled step; `memory` None, with `used` bytes of HBM instead, where it does not fit."""

    text: str
    memory: Any
    used: float
    seconds: float
    mesh: Mesh
    student: mert_v1.Student
    batch: Mapping[str, Any]


def make_topology(name: str) -> Topology:
    """The devices called "v5e:4x4" or, fake ones, "cpu:8"; call before jax's backend starts.

    Raises UserError for others, and where libtpu is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", name)
    if not found or found[1] not in (*TPUS, "cpu"):
        raise UserError(
            f"--topology={name!r} is unknown; it is {', '.join(TPUS)} and a shape, such as v5e:4x4 "
            "or v4:2x2x4, or cpu:8"
        )
    number = math.prod(int(n) for n in found[2].split("x"))
    jax.config.update("jax_platforms", "cpu")  # of a TPU that is here, nothing is wanted
    if found[1] == "cpu":
        flag = f"--xla_force_host_platform_device_count={number}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        here = jax.devices("cpu")
        if not 1 <= number <= len(here):
            raise UserError(f"--topology={name}: jax has {len(here)} CPU devices here")
        return Topology(name, here[:number], None)
    chip = TPUS[found[1]]
    return Topology(name, _tpu_devices(name, chip, number), chip)


def _tpu_devices(name: str, chip: Chip, number: int) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler: pip install -e .[plan] (libtpu, 137 MB; no "
            "TPU is needed)"
        )
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no TPU is taken, so that other programs may plan too
        # or libtpu asks Cloud's metadata server what machine this is
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-{number * chip.cores}",
    )
    from jax.experimental import topologies

    options = {}
    if chip.cores > 1:  # one device a chip, as jax on a TPU VM has it
        options["chip_config_name"] = "megacore"
    elif name.endswith(":2x4"):  # the one slice of v5e and v6e that is a host of eight chips
        options["chips_per_host_bounds"] = (2, 4, 1)
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as e:
        said = str(e).splitlines()[0].rstrip(".")
        raise UserError(
            f"--topology={name!r} is no slice that libtpu knows ({said}); shapes of "
            f"{name.partition(':')[0]} are in Cloud TPU's documentation, such as v5e:4x4, v4:2x2x4"
        ) from e


def make_mesh(config: ConfigDict, devices: Sequence[Any]) -> Mesh:
    """The config's mesh of `devices`; UserError where they or a micro-batch cannot be split so."""
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = sharding.make_mesh(*sizes, devices=devices)
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    return mesh


def compile_step(config: ConfigDict, devices: Sequence[Any], choice: str = "") -> Compiled:
    """`config`'s training step for `devices`, compiled.

    choice: whether an RVQ-VAE's codes are "stored" or "computed"; "": as the dataset has them,
    computed where none is given. Raises UserError for settings that do not go together.
    """
    build.check(config)
    mesh = make_mesh(config, devices)
    stored = abstract_teachers.stored_codes(config, choice)
    teachers = abstract_teachers.make(config, stored)
    student = build.student(config, teachers, stored)
    made = build.make_experiment(config, student, teachers, mesh)
    state = jax.tree.map(_placed, made.abstract, made.shardings)
    whole = functools.partial(_placed, sharding=sharding.replicated(mesh))
    teacher_params = jax.tree.map(whole, {name: t.params for name, t in teachers.items()})
    inputs = batch(config, made.context, stored, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    begun = time.monotonic()
    text, memory, used = "", None, 0.0
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        lowered = made.train_step.lower(state, teacher_params, inputs, key)
        try:
            done = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            text, memory = _text(folder) or done.as_text(), done.memory_analysis()
        except jax.errors.JaxRuntimeError as e:
            used = _used_hbm(str(e))
            if not used:
                raise
    return Compiled(text, memory, used, time.monotonic() - begun, mesh, student, inputs)


def _text(folder: str) -> str:
    """The optimised program as the compiler has dumped it: `as_text` cannot read what runs on the
    sparse cores of v5p and v6e (jax 0.11)."""
    dumped = glob.glob(os.path.join(glob.escape(folder), "*.after_codegen.txt"))
    if not dumped:
        return ""
    with open(max(dumped, key=os.path.getsize)) as file:
        return file.read()


def _used_hbm(error: str) -> float:
    """Bytes that a program needs at least, from the compiler's refusal; 0 for another error."""
    found = re.search(r"(?:required for [^()]*\(|Used )([\d.]+)([KMGT]?)\b.*HBM", error, re.I)
    return float(found[1]) * 1024.0 ** " KMGT".index(found[2] or " ") if found else 0.0


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def batch(
    config: ConfigDict, context: int, stored: Mapping[str, stored_codes.CodesInfo], mesh: Mesh
) -> dict[str, Any]:
    """The shapes of a global batch, as `train` makes it, and how it lies on the mesh."""
    rows, samples = config.batch_size, config.data.num_samples
    shape = lambda dims, dtype, axes=sharding.BATCH: jax.ShapeDtypeStruct(
        dims, dtype, sharding=NamedSharding(mesh, axes)
    )
    frames = -(-samples // HOP_LENGTH)
    return {
        "audio": shape((rows, context + samples), jnp.int16),
        "looped": shape((rows,), jnp.bool_),
        "record": shape((rows,), jnp.int32),
        "faulty": shape((rows,), jnp.int32),
        "requests": shape((mesh.size,), jnp.int32, PartitionSpec(sharding.AXES)),
        "codes": {
            name: shape((rows, frames, info.books), jnp.uint16) for name, info in stored.items()
        },
    }
