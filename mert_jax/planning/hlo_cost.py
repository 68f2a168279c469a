"""Costs of a step, read from its optimised HLO: cycles, products, memory traffic, collectives.

    summary(compiled.as_text(), frames=374)

Nothing here is measured. Cycles are the TPU compiler's static estimates, which leave out
collectives, loop overhead and Pallas kernels. Bytes are those of the operands and results in HBM
of every executed instruction, padded to tiles.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mert_jax.planning import hlo_parser
from mert_jax.planning.hlo_parser import Computation, Instruction, Module, Run, Shape

TOP = 10  # entries of the lists of the costliest
# instructions without work of their own: names for what exists, or what `executed` walks into
_FREE = set(
    "parameter constant get-tuple-element tuple bitcast while call conditional after-all "
    "partition-id replica-id async-start async-update async-done opt-barrier add-dependency".split()
)
COLLECTIVES = tuple(
    "all-reduce all-gather reduce-scatter collective-permute all-to-all ragged-all-to-all "
    "collective-broadcast".split()
)


class _Op(NamedTuple):
    """An executed instruction, and its cycles, HBM bytes and source line in a step."""

    run: Run
    cycles: int
    bytes: int
    source: str

    def row(self, **figures: Any) -> dict[str, Any]:
        name, place = self.run.instruction.name, self.run.instruction.op_name
        return dict(op=name, **figures, times=self.run.times, source=self.source, what=place)


def summary(text: str, frames: int | None = None, inside: str = "") -> dict[str, Any]:
    """Return the costs of one step on one device, from the text of its optimised HLO.

    flops: of matrix products and convolutions only. collectives: see there. costliest_ops,
    big_copies (HBM to HBM): the first TOP. square_fp32_tensors: float32 arrays in HBM of `frames` x
    `frames`, or rounded up. pallas_kernels: how many run. Source lines are the innermost in files
    that begin with `inside`. Raises ValueError for a text that is not HLO.
    """
    module = hlo_parser.parse(text)
    runs = hlo_parser.executed(module)
    source = functools.partial(module.source, inside=inside)
    exchanges = collectives(module, runs, source)
    # a collective may be done in pieces inside fusions, whose own traffic is counted without it
    fused = sum(x["bytes"] * x["times"] for x in exchanges if x["fused"])
    ops = []
    for run in runs:
        cycles = run.instruction.cycles * run.times
        ops.append(_Op(run, cycles, hbm_bytes(module, run), source(run.instruction)))
    total = sum(op.cycles for op in ops)
    copies = [op for op in ops if op.bytes >= 2**20 and _is_copy(module, op.run)]
    return {
        "cycles": total,
        "flops": sum(flops(module, run) for run in runs),
        "hbm_bytes": sum(op.bytes for op in ops) + fused,
        "collectives": exchanges,
        "loops": [
            op.row(trips=hlo_parser.trip_count(module, op.run))
            for op in ops
            if op.run.instruction.opcode == "while"
        ],
        "costliest_ops": [
            op.row(cycles=op.cycles, share=round(op.cycles / total, 4))
            for op in sorted(ops, key=lambda op: -op.cycles)[:TOP]
            if op.cycles
        ],
        "big_copies": [
            op.row(bytes=op.bytes) for op in sorted(copies, key=lambda op: -op.bytes)[:TOP]
        ],
        "square_fp32_tensors": [
            op.row(shape=f"{shape.dtype}{list(shape.dims)}", bytes=shape.padded)
            for op in ops
            if frames and not _is_free(op.run.instruction)
            for shape in op.run.instruction.shapes
            if _is_square_fp32(shape, frames)
        ],
        "pallas_kernels": sum(
            run.times for run in runs if '_target="tpu_custom_call"' in run.instruction.rest
        ),
    }


def _is_copy(module: Module, run: Run) -> bool:
    """Return True if an instruction only moves elements, from HBM to HBM."""
    instruction = run.instruction
    itself, *inside = hlo_parser.unfused(module, instruction, run.computation)
    opcodes = {x.opcode for x, _ in inside or [itself]}
    copies = {"copy", "transpose"}
    if not opcodes & copies or opcodes - copies - {"bitcast", "reshape", "parameter"}:
        return False
    arrays = sum(run.computation.operand_shapes(instruction), instruction.shapes)
    return all(shape.in_hbm for shape in arrays)


def _is_square_fp32(shape: Shape, frames: int) -> bool:
    lengths = {-(-frames // tile) * tile for tile in (1, 8, 16, 128)}  # rounded up to whole tiles
    is_square = len(shape.dims) > 2 and any(shape.dims.count(length) >= 2 for length in lengths)
    return is_square and shape.dtype == "f32" and shape.in_hbm


def _is_free(instruction: Instruction) -> bool:
    opcode, rest = instruction.opcode, instruction.rest
    names_only = re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', rest)
    return bool(names_only) or opcode in _FREE or opcode.endswith("-done")


def flops(module: Module, run: Run) -> float:
    """Return the FLOPs of matrix products and convolutions, two a multiply-add.

    Products with padding or with the holes of a dilation are not counted.
    """
    parts = hlo_parser.unfused(module, run.instruction, run.computation)
    return run.times * sum(2.0 * _multiply_adds(x, computation) for x, computation in parts)


def _multiply_adds(product: Instruction, computation: Computation) -> int:
    if product.opcode not in ("dot", "convolution"):
        return 0
    (left, *_), (right, *_) = computation.operand_shapes(product)
    result = product.shapes[0]
    if product.opcode == "dot":
        axes = product.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        contracted = [left.dims[int(axis)] for axis in axes.split(",") if axis]
        return math.prod(result.dims) * math.prod(contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest).groups()
    left, right, result = (
        dict(zip(names, shape.dims, strict=True))
        for names, shape in zip(labels, (left, right, result), strict=True)
    )
    window = product.attribute(r"window=\{([^}]*)\}").split()
    options = {key: text.split("x") for key, text in (part.split("=") for part in window)}

    def option(key: str, axis: int, default: int) -> int:
        return int(options[key][axis].split("_")[0]) if key in options else default

    groups = int(product.attribute(r"batch_group_count=(\d+)") or 1)
    total = left["b"] // groups * right["i"] * right["o"]
    for axis in range(sum(name.isdigit() for name in labels[0])):
        total *= _pairs(
            *(each[str(axis)] for each in (left, right, result)),
            stride=option("stride", axis, 1),
            pad=option("pad", axis, 0),
            holes=option("lhs_dilate", axis, 1),
            spread=option("rhs_dilate", axis, 1),
        )
    return total


@functools.lru_cache(maxsize=4096)
def _pairs(n: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Count the pairs of an output and a kernel position that meet one of `n` input elements."""
    reach = (n - 1) * holes
    (few, few_step), (many, many_step) = sorted([(out, stride), (kernel, spread)])
    first_places = np.arange(many, dtype=np.int64) * many_step - pad
    total = 0
    for i in range(few):
        place = first_places + i * few_step
        total += int(((place >= 0) & (place <= reach) & (place % holes == 0)).sum())
    return total


def hbm_bytes(module: Module, run: Run) -> int:
    """Return the bytes that an instruction reads from HBM and writes to it, padding included."""
    instruction, opcode = run.instruction, run.instruction.opcode
    if _is_free(instruction):
        return 0
    sources = run.computation.operand_shapes(instruction)
    if opcode == "copy-start":
        return run.times * _padded_hbm(instruction.shapes[:2])
    if opcode in ("slice-start", "dynamic-slice-start"):
        moved = instruction.shapes[len(instruction.operands)]
        return run.times * moved.padded * sum(side.in_hbm for side in (sources[0][0], moved))
    if opcode.removesuffix("-start") in COLLECTIVES:
        operands = sum(sources, ())
        results = instruction.shapes[len(operands) :] if "-start" in opcode else ()
        return run.times * _padded_hbm([*operands, *(results or instruction.shapes)])
    size = _written(module, run)
    for number, shapes in enumerate(sources):
        if full := _padded_hbm(shapes):
            size += min(full, _read(module, instruction, number, full))
    return run.times * size


def _padded_hbm(shapes: Sequence[Shape]) -> int:
    return sum(shape.padded for shape in shapes if shape.in_hbm)


def _read(module: Module, user: Instruction, number: int, full: int) -> int:
    """Return the bytes read of an operand of `full` bytes: of one that is only sliced, the slices.

    0 for what is updated in place or handed on; `summary` counts a fused collective once.
    """
    if user.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
        return user.shapes[0].padded
    if user.opcode in ("dynamic-update-slice", "scatter") and number == 0:
        return 0
    if user.opcode == "tuple" or user.opcode in COLLECTIVES:
        return 0
    if user.opcode != "fusion":
        return full
    body = module.computations[user.called("calls")].instructions.values()

    def read_of(name: str) -> int:
        return sum(
            read_of(x.name) if x.opcode == "bitcast" else _read(module, x, i, full)
            for x in body
            for i, operand in enumerate(x.operands)
            if operand == name
        )

    return sum(
        read_of(x.name) for x in body if x.opcode == "parameter" and x.literal == str(number)
    )


def _written(module: Module, run: Run) -> int:
    results = run.instruction.shapes
    updates = _updates(module, run.computation, run.instruction)
    if len(updates) != len(results):
        return _padded_hbm(results)
    return sum(
        shape.padded if update is None else min(update, shape.padded)
        for shape, update in zip(results, updates, strict=True)
        if shape.in_hbm
    )


def _updates(module: Module, computation: Computation, x: Instruction) -> list[int | None]:
    """Return the bytes that each result updates in place, None for a result written wholly."""
    if x.opcode in ("dynamic-update-slice", "scatter"):
        update = computation.instructions[x.operands[1 if x.opcode[0] == "d" else 2]]
        return [update.shapes[0].padded]
    if x.opcode == "fusion":
        body = module.computations[x.called("calls")]
        return _updates(module, body, body.instructions[body.root])
    if x.opcode == "bitcast":
        return _updates(module, computation, computation.instructions[x.operands[0]])
    if x.opcode == "tuple":
        elements = (computation.instructions[name] for name in x.operands)
        return [size for each in elements for size in _updates(module, computation, each)[:1]]
    if x.opcode == "parameter" or x.opcode in COLLECTIVES:
        return [0]  # handed on, as in `_read`
    return [None]


def collectives(
    module: Module, runs: Sequence[Run], source: Callable[[Instruction], str]
) -> list[dict[str, Any]]:
    """Return the executed collectives, each with its kind, bytes, group, times, source and fused.

    bytes: the whole array, the larger of input and output. group: devices, None for all. fused:
    done in pieces inside other fusions, all of which name its channel.
    """
    rows, channels = [], set()
    for run in runs:
        for x, computation in hlo_parser.unfused(module, run.instruction, run.computation):
            kind = x.opcode.removesuffix("-start")
            fused, channel = x is not run.instruction, x.attribute(r"channel_id=(\d+)")
            if kind not in COLLECTIVES or (fused and channel in channels):
                continue
            if fused and channel:
                channels.add(channel)
            group = group_size(x.rest)
            size = sum(shape.size for shape in sum(computation.operand_shapes(x), ()))
            size *= (group or 1) if kind == "all-gather" else 1
            row = dict(kind=kind, bytes=size, group=group, times=run.times, source=source(x))
            rows.append(row | {"fused": fused})
    return rows


def group_size(rest: str) -> int | None:
    """Return the devices in a group, from the `replica_groups` of a collective; None for all."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    return None
