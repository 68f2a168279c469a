"""Costs of a step, read from its optimised HLO: cycles, products, memory traffic, collectives.

Nothing here is measured. Cycles are the TPU compiler's static estimates, which leave out
collectives, loop overhead and Pallas kernels. Bytes are those of the operands and results in HBM
of every executed instruction, padded to tiles.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mert_jax.planning import hlo_parser
from mert_jax.planning.hlo_parser import Instruction, Shape

TOP = 10  # costliest operations, and copies from HBM to HBM, in a summary
# instructions without work of their own: names for what exists, or what `executed` walks into
_FREE = set(
    "parameter constant get-tuple-element tuple bitcast while call conditional after-all "
    "partition-id replica-id async-start async-update async-done opt-barrier add-dependency".split()
)
COLLECTIVES = tuple(
    "all-reduce all-gather reduce-scatter collective-permute all-to-all ragged-all-to-all "
    "collective-broadcast".split()
)


def summary(text: str, inside: str = "") -> dict[str, Any]:
    """Return the costs of a step on one device; sources: innermost in files that begin `inside`."""
    runs = list(hlo_parser.executed(hlo_parser.parse(text)))

    def row(x: Instruction, times: int, **figures: Any) -> dict[str, Any]:
        own = [place.removeprefix(inside) for place in x.stack if place.startswith(inside)]
        source, what = next(iter(own or x.stack), ""), x.attribute(r'op_name="([^"]*)"')
        return dict(op=x.name, **figures, times=times, source=source, what=what)

    def costliest(costs: Iterable[int]) -> list[tuple[int, tuple[Instruction, int]]]:
        return sorted(zip(costs, runs, strict=True), key=lambda pair: -pair[0])[:TOP]

    cycles = [times * x.cycles for x, times in runs]
    traffic = [times * hbm_bytes(x) for x, times in runs]
    copied = [n * (n >= 2**20 and _is_copy(x)) for n, (x, _) in zip(traffic, runs, strict=True)]
    loops = [run for run in runs if run[0].opcode == "while"]
    exchanges, total = collectives(runs), sum(cycles)
    return {
        "cycles": total,
        "flops": sum(times * flops(x) for x, times in runs),
        # a collective may be done in pieces inside fusions, whose own traffic is counted without it
        "hbm_bytes": sum(traffic) + sum(x["bytes"] * x["times"] for x in exchanges if x["fused"]),
        "collectives": exchanges,
        "loops": [row(*run, trips=hlo_parser.trip_count(run[0])) for run in loops],
        "costliest_ops": [
            row(*run, cycles=n, share=round(n / total, 4)) for n, run in costliest(cycles) if n
        ],
        "big_copies": [row(*run, bytes=n) for n, run in costliest(copied) if n],
        "pallas_kernels": sum(n for x, n in runs if '_target="tpu_custom_call"' in x.rest),
    }


def _is_copy(x: Instruction) -> bool:
    """Return True if an instruction only moves elements, from HBM to HBM."""
    itself, *inside = x.unfused()
    opcodes = {part.opcode for part in inside or [itself]}
    copies = {"copy", "transpose"}
    moves = opcodes & copies and opcodes <= copies | {"bitcast", "reshape", "parameter"}
    return bool(moves) and all(shape.in_hbm for each in (x, *x.operands) for shape in each.shapes)


def _is_free(x: Instruction) -> bool:
    names_only = re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', x.rest)
    return bool(names_only) or x.opcode in _FREE or x.opcode.endswith("-done")


def flops(x: Instruction) -> float:
    """Return the FLOPs of the products and convolutions in `x`, without padding and holes."""
    products = {"dot": _dot_multiply_adds, "convolution": _convolution_multiply_adds}
    return 2.0 * sum(products[y.opcode](y) for y in x.unfused() if y.opcode in products)


def _dot_multiply_adds(x: Instruction) -> int:
    axes = re.findall(r"\d+", x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    left = x.operands[0].shapes[0].dims
    return math.prod(x.shapes[0].dims) * math.prod(left[int(axis)] for axis in axes)


def _convolution_multiply_adds(x: Instruction) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest).groups()
    left, right, result = (
        dict(zip(names, each.shapes[0].dims, strict=True))
        for names, each in zip(labels, (*x.operands[:2], x), strict=True)
    )
    window = re.findall(r"(\w+)=(\S+)", x.attribute(r"window=\{([^}]*)\}"))
    options = {key: text.split("x") for key, text in window}
    groups = int(x.attribute(r"batch_group_count=(\d+)") or 1)
    total = left["b"] // groups * right["i"] * right["o"]
    for i, axis in enumerate(sorted(filter(str.isdigit, labels[0]))):
        stride, pad, holes, spread = (
            int(options[key][i].split("_")[0]) if key in options else default
            for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        total *= _pairs(left[axis], right[axis], result[axis], stride, pad, holes, spread)
    return total


@functools.lru_cache(maxsize=4096)
def _pairs(n: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Count the pairs of an output and a kernel position that meet one of `n` input elements."""
    places = np.add.outer(np.arange(out) * stride - pad, np.arange(kernel) * spread)
    return int(((places >= 0) & (places <= (n - 1) * holes) & (places % holes == 0)).sum())


def hbm_bytes(x: Instruction) -> int:
    """Return the bytes that an instruction reads from HBM and writes to it, padding included."""
    if _is_free(x):
        return 0
    if x.opcode == "copy-start":
        return _padded_hbm(x.shapes[:2])
    if x.opcode in ("slice-start", "dynamic-slice-start"):
        moved = x.shapes[len(x.operands)]
        return moved.padded * (x.operands[0].shapes[0].in_hbm + moved.in_hbm)
    sources = [operand.shapes for operand in x.operands]
    if x.opcode.removesuffix("-start") in COLLECTIVES:
        operands = sum(sources, ())
        results = x.shapes[len(operands) :] if "-start" in x.opcode else ()
        return _padded_hbm([*operands, *(results or x.shapes)])
    updates = _updates(x)
    if len(updates) != len(x.shapes):
        updates = [math.inf] * len(x.shapes)
    results = zip(x.shapes, updates, strict=True)
    size = sum(min(shape.padded, update) for shape, update in results if shape.in_hbm)
    for number, shapes in enumerate(sources):
        if full := _padded_hbm(shapes):
            size += min(full, _read(x, number, full))
    return size


def _padded_hbm(shapes: Sequence[Shape]) -> int:
    return sum(shape.padded for shape in shapes if shape.in_hbm)


def _read(user: Instruction, number: int, full: int) -> int:
    """Return the bytes read of an operand of `full` bytes: of one that is only sliced, the slices.

    0 for what is updated in place or handed on; `summary` counts a fused collective once.
    """
    if user.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
        return user.shapes[0].padded
    in_place = user.opcode in ("dynamic-update-slice", "scatter") and number == 0
    if in_place or user.opcode in ("tuple", *COLLECTIVES):
        return 0
    if user.opcode != "fusion":
        return full
    body = user.called("calls").instructions

    def read_of(source: Instruction) -> int:
        return sum(
            read_of(x) if x.opcode == "bitcast" else _read(x, i, full)
            for x in body
            for i, operand in enumerate(x.operands)
            if operand is source
        )

    return sum(read_of(x) for x in body if (x.opcode, x.literal) == ("parameter", str(number)))


def _updates(x: Instruction) -> list[float]:
    """Return the bytes that each result updates in place, infinity for one written wholly."""
    if x.opcode in ("dynamic-update-slice", "scatter"):
        return [x.operands[2 if x.opcode == "scatter" else 1].shapes[0].padded]
    if x.opcode == "fusion":
        return _updates(x.called("calls").root)
    if x.opcode == "bitcast":
        return _updates(x.operands[0])
    if x.opcode == "tuple":
        return [size for operand in x.operands for size in _updates(operand)[:1]]
    # parameters and collectives are handed on, as in `_read`
    return [0 if x.opcode in ("parameter", *COLLECTIVES) else math.inf]


def collectives(runs: Iterable[tuple[Instruction, int]]) -> list[dict[str, Any]]:
    """Return the executed collectives; group: None for all devices.

    bytes: the larger of input and output. fused: in pieces, in fusions that share its channel.
    """
    rows, channels = [], set()
    for run, times in runs:
        for x in run.unfused():
            kind, fused = x.opcode.removesuffix("-start"), x is not run
            channel = x.attribute(r"channel_id=(\d+)") if fused else ""
            if kind in COLLECTIVES and (not channel or channel not in channels):
                channels.add(channel)
                group = group_size(x.rest)
                size = sum(shape.size for operand in x.operands for shape in operand.shapes)
                size *= (group or 1) if kind == "all-gather" else 1
                rows.append(dict(kind=kind, bytes=size, group=group, times=times, fused=fused))
    return rows


def group_size(rest: str) -> int | None:
    """Return the devices in a group, from the `replica_groups` of a collective; None for all."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(match[1].split(",")) if match else None
