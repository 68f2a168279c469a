"""The device mesh, and the layout of parameters and batches on it."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mert_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# logical axis of a parameter -> mesh axis; all others are replicated
RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return a mesh of `devices` (None: all); one size may be -1, the rest. Raises UserError."""
    sizes, number = [data, fsdp, tensor], len(devices or jax.devices())
    if sizes.count(-1) == 1:
        rest = number // max(math.prod(s for s in sizes if s != -1), 1)
        sizes = [rest if s == -1 else s for s in sizes]
    if math.prod(sizes) != number or min(sizes) < 1:
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not make {number} devices; set "
            "mesh.data, mesh.fsdp and mesh.tensor so that their product does (-1: the rest)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(micro_batch: int, mesh: Mesh) -> None:
    """Raise UserError if the clips of a micro-batch cannot be split over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if micro_batch % shards:
        clips = f"{micro_batch} clips (batch_size / accumulation)"
        over = f"mesh.data * mesh.fsdp = {shards} shards; make them a multiple of it"
        raise UserError(f"micro-batches of {clips} cannot be split over {over}")


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return `spec` in mesh axes, without those that do not divide their dimension."""
    pairs = itertools.zip_longest(map(RULES.get, spec), shape)
    fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in pairs]
    return PartitionSpec(*fits)


def state_shardings(init: Callable[[], Any], mesh: Mesh) -> Any:
    """Return the shardings of the state that `init` returns, with flax's logical axis names."""
    boxed = jax.eval_shape(init)

    def place(leaf: Any, spec: PartitionSpec | None) -> NamedSharding:
        return NamedSharding(mesh, _fitting(spec or (), leaf.shape, mesh))

    return jax.tree.map(place, nn.unbox(boxed), nn.get_partition_spec(boxed))


def on_each_shard(
    function: Callable[..., jax.Array], x: jax.Array, *replicated: Any, differentiable: bool = True
) -> jax.Array:
    """Return `function(x, *replicated)`, computed by each device on its own rows of `x` [B, ...].

    The loops of a `differentiable` function must not begin with constants that become rows of `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return function(x, *replicated)
    specs = (BATCH, *[PartitionSpec()] * len(replicated))
    sharded = jax.shard_map(function, in_specs=specs, out_specs=BATCH, check_vma=differentiable)
    return sharded(x, *replicated)


def rows_of_host(number: int, mesh: Mesh) -> np.ndarray:
    """Return the rows of a global batch of `number` on this process's devices, ascending."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((number,)).values()
    return np.unique(np.concatenate([np.arange(number)[rows] for rows in indices]))


def global_batch(rows: np.ndarray, number: int, mesh: Mesh) -> jax.Array:
    """Return the global array [`number`, ...] of which `rows` are those of `rows_of_host`."""
    numbers, shape = rows_of_host(number, mesh), (number, *rows.shape[1:])

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return rows[np.searchsorted(numbers, np.arange(number)[index[0]])]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), shard)


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """Lay out `tree`, of which every process has all, by `sharding`."""

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def each_host(value: int, mesh: Mesh) -> jax.Array:
    """Return int32 [devices] with the `value` of each device's own process."""
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    here = np.full(1, value, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: here)
