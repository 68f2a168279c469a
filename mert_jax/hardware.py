"""Peak rates and memory of TPUs and GPUs, as published by their vendors."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A kind of device as jax counts them (a TPU of two cores is one); GPUs have the first two."""

    kinds: tuple[str, ...]  # prefixes of jax's `device_kind`
    flops: float  # peak dense bf16 FLOP/s
    capacity: float = 0.0  # bytes of HBM that a program may use
    bandwidth: float = 0.0  # of HBM, bytes a second
    links: float = 0.0  # bytes a second sent over all links to other chips
    clock: float = 0.0  # Hz
    accelerator: str = ""  # Cloud TPU's name of a slice, before the number of `cores`
    cores: int = 1


GIB = 2**30
# Peak FLOP/s, HBM and interconnect: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e ("peak
# compute per chip", "HBM bandwidth", half of the bidirectional "ICI bandwidth per chip", which for
# v4 is given as 2400 Gbps one way). Capacity: from libtpu 0.0.52's error for a program that does
# not fit; libtpu keeps the rest of the published 32, 16, 95 and 32 GB. Clock: peak FLOP/s over the
# FLOPs of the matrix units in a cycle (two a multiply-add; v4 and v5p have 8 units of 128 x 128,
# v5e has 4, v6e 4 of 256 x 256), rounded.
TPUS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1228e9, 300e9, 1.05e9, "v4", cores=2),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 200e9, 1.5e9, "v5litepod"),
    # jax calls a v5p "TPU v5"; v5e comes before it, as "TPU v5 lite" has the same prefix
    "v5p": Chip(("TPU v5p", "TPU v5"), 459e12, 95.73 * GIB, 2765e9, 600e9, 1.75e9, "v5p", cores=2),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1638e9, 400e9, 1.75e9, "v6e"),
}
# without sparsity, from NVIDIA's data sheets
GPUS = {
    "A100": Chip(("NVIDIA A100",), 312e12),
    "H100": Chip(("NVIDIA H100",), 989e12),
    "H200": Chip(("NVIDIA H200",), 989e12),
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a `device_kind` of jax, None if unknown (CPUs)."""
    chips = [*TPUS.values(), *GPUS.values()]
    return next((chip.flops for chip in chips if device_kind.startswith(chip.kinds)), None)
