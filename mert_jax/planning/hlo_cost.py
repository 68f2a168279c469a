"""What a step costs, read from its optimised HLO: cycles, products, memory traffic, collectives.

    summary(compiled.as_text(), frames=374)

Nothing here is measured. Cycles are the TPU compiler's own static estimates, which leave out
collectives, the overhead of loops and Pallas kernels; bytes are those of operands and results of
every instruction executed, padded to tiles, where they lie in HBM.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mert_jax.planning import hlo_parser
from mert_jax.planning.hlo_parser import Computation, Instruction, Module, Run, Shape

# no work of their own: names for what is there already, or what `executed` walks into
_FREE = set(
    "parameter constant get-tuple-element tuple bitcast while call conditional after-all "
    "partition-id replica-id async-start async-update async-done opt-barrier add-dependency".split()
)
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)


def summary(text: str, frames: int | None = None, inside: str = "", top: int = 10) -> dict:
    """The costs of one step on one device, from the text of its optimised HLO.

    cycles; flops (products of matrices and convolutions only); hbm_bytes; collectives (a list:
    kind, bytes, group, times, source); loops; costliest_ops, costliest_lines, big_copies (HBM to
    HBM; `top` of each); square_fp32 (float32 arrays in HBM of `frames` x `frames`, or rounded up);
    pallas_kernels (how many run). Source lines are the innermost in files that begin with `inside`.
    ValueError for what is no HLO.
    """
    whole = hlo_parser.parsed(text)
    runs, loops = hlo_parser.executed(whole)
    total = sum(run.instruction.cycles * run.times for run in runs)
    traffic = [hbm_bytes(whole, run) for run in runs]
    where = functools.partial(whole.source, inside=inside)
    exchanged = collectives(whole, runs, where)
    return {
        "cycles": total,
        "flops": sum(flops(whole, run) for run in runs),
        "hbm_bytes": sum(traffic) + sum(c["bytes"] * c["times"] for c in exchanged if c["fused"]),
        "collectives": exchanged,
        "loops": [
            {
                "name": loop.instruction.name,
                "trips": loop.trips,
                "times": loop.times,
                "collective_matmul": "windowed_dot_general" in loop.instruction.rest,
                "source": where(loop.instruction),
            }
            for loop in loops
        ],
        "costliest_ops": _costliest(runs, total, where, top),
        "costliest_lines": _by_line(runs, traffic, total, where, top),
        "big_copies": _copies(whole, runs, traffic, where, top),
        "square_fp32": _squares(runs, frames, where) if frames else [],
        "pallas_kernels": sum(
            run.times
            for run in runs
            if 'custom_call_target="tpu_custom_call"' in run.instruction.rest
        ),
    }


def _costliest(runs, total, where, top):
    found = sorted(runs, key=lambda run: -run.instruction.cycles * run.times)
    return [
        {
            "op": run.instruction.name,
            "cycles": run.instruction.cycles * run.times,
            "share": round(run.instruction.cycles * run.times / total, 4),
            "times": run.times,
            "source": where(run.instruction),
            "what": run.instruction.op_name,
        }
        for run in found[:top]
        if run.instruction.cycles
    ]


def _by_line(runs, traffic, total, where, top):
    cycles, moved = Counter(), Counter()
    for run, size in zip(runs, traffic, strict=True):
        line = where(run.instruction)
        cycles[line] += run.instruction.cycles * run.times
        moved[line] += size
    return [
        {"source": line or "?", "share": round(n / total, 4), "cycles": n, "hbm_bytes": moved[line]}
        for line, n in cycles.most_common(top)
        if n
    ]


def _copies(whole, runs, traffic, where, top):
    found = [
        {
            "op": run.instruction.name,
            "bytes": size,
            "times": run.times,
            "source": where(run.instruction),
            "what": run.instruction.op_name,
        }
        for run, size in zip(runs, traffic, strict=True)
        if size >= 2**20 and _is_copy(whole, run)
    ]
    return sorted(found, key=lambda copy: -copy["bytes"])[:top]


def _is_copy(whole: Module, run: Run) -> bool:
    """Whether it only moves elements, from HBM to HBM."""
    instruction, computation = run.instruction, run.computation
    moves = {"copy", "transpose", "bitcast", "reshape", "parameter"}
    kinds = {x.opcode for x, _ in hlo_parser.inner(whole, instruction)} or {instruction.opcode}
    if not kinds <= moves or not kinds & {"copy", "transpose"}:
        return False
    sources = [shape for shapes in computation.shapes(instruction) for shape in shapes]
    return all(shape.in_hbm for shape in [*sources, *instruction.shapes])


def _squares(runs, frames, where):
    # as long as a clip's frames, or these rounded up to whole tiles
    lengths = {-(-frames // tile) * tile for tile in (1, 8, 16, 128)}
    is_square = lambda shape: any(shape.dims.count(length) >= 2 for length in lengths)
    return [
        {
            "op": run.instruction.name,
            "shape": f"{shape.dtype}{list(shape.dims)}",
            "bytes": shape.padded,
            "times": run.times,
            "source": where(run.instruction),
        }
        for run in runs
        if not _is_free(run.instruction)
        for shape in run.instruction.shapes
        if shape.dtype == "f32" and shape.in_hbm and len(shape.dims) > 2 and is_square(shape)
    ]


def _is_free(instruction: Instruction) -> bool:
    """Whether it does nothing itself."""
    named = re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', instruction.rest)
    return bool(named) or instruction.opcode in _FREE or instruction.opcode.endswith("-done")


# ---- products


def flops(whole: Module, run: Run) -> float:
    """FLOPs of the matrix products and convolutions of what is run, two a multiply-add; products
    with padding or with the holes of a dilation are not counted."""
    inside = hlo_parser.inner(whole, run.instruction)
    return run.times * sum(_flops(x, c) for x, c in [(run.instruction, run.computation), *inside])


def _flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (shapes[0] for shapes in computation.shapes(instruction))
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        contracted = math.prod(left.dims[int(axis)] for axis in axes.split(",") if axis)
        return 2.0 * math.prod(instruction.shapes[0].dims) * contracted
    return 2.0 * _multiply_adds(instruction, left, right)


def _multiply_adds(convolution: Instruction, left: Shape, right: Shape) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)
    window = re.search(r"window=\{([^}]*)\}", convolution.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sum(label.isdigit() for label in labels[1])
    numbers = lambda key, default: (
        options[key].split("x") if key in options else [default] * spatial
    )
    stride, holes, spread = (
        [int(n) for n in numbers(key, "1")] for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    pad = [int(p.split("_")[0]) for p in numbers("pad", "0_0")]
    groups = re.search(r"batch_group_count=(\d+)", convolution.rest)
    size = lambda shape, names, label: shape.dims[names.index(label)]
    total = size(left, labels[1], "b") // (int(groups[1]) if groups else 1)
    total *= size(right, labels[2], "i") * size(right, labels[2], "o")
    for i in range(spatial):
        places = (size(left, labels[1], str(i)), size(right, labels[2], str(i)))
        out = size(convolution.shapes[0], labels[3], str(i))
        total *= _pairs(*places, out, stride[i], pad[i], holes[i], spread[i])
    return total


@functools.lru_cache(maxsize=4096)
def _pairs(n: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Pairs of an output position and a kernel position that meet an input element."""
    reach = (n - 1) * holes
    few, many = sorted([(out, stride), (kernel, spread)])
    at = np.arange(many[0], dtype=np.int64) * many[1] - pad
    total = 0
    for i in range(few[0]):
        place = at + i * few[1]
        total += int(((place >= 0) & (place <= reach) & (place % holes == 0)).sum())
    return total


# ---- memory


def hbm_bytes(whole: Module, run: Run) -> int:
    """Bytes that an instruction reads from HBM and writes to it, tile padding included."""
    instruction, computation = run.instruction, run.computation
    opcode = instruction.opcode
    if _is_free(instruction):
        return 0
    sources = computation.shapes(instruction)
    if opcode == "copy-start":
        return run.times * sum(shape.padded for shape in instruction.shapes[:2] if shape.in_hbm)
    if opcode in ("slice-start", "dynamic-slice-start"):
        moved = instruction.shapes[len(instruction.operands)]
        sides = [sources[0][0], moved]
        return run.times * sum(moved.padded for side in sides if side.in_hbm)
    if opcode.removesuffix("-start") in COLLECTIVES:
        taken = [shape for shapes in sources for shape in shapes]
        given = instruction.shapes[len(taken) :] if "-start" in opcode else ()
        both = [*taken, *(given or instruction.shapes)]
        return run.times * sum(shape.padded for shape in both if shape.in_hbm)
    reads = sum(_read(whole, instruction, number, shapes) for number, shapes in enumerate(sources))
    return run.times * (reads + _written(whole, instruction, computation))


def _read(whole: Module, instruction: Instruction, number: int, shapes: Sequence[Shape]) -> int:
    """Bytes read of an operand: of one that is only sliced, the slices."""
    full = sum(shape.padded for shape in shapes if shape.in_hbm)
    if not full:
        return 0
    return min(full, _used(whole, instruction, number, full))


def _used(whole: Module, user: Instruction, number: int, full: int) -> int:
    if user.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
        return user.shapes[0].padded
    if user.opcode in ("dynamic-update-slice", "scatter") and number == 0:
        return 0  # in place
    if user.opcode == "tuple" or user.opcode in COLLECTIVES:
        return 0  # handed on; a fused collective is counted once, in `summary`
    if user.opcode != "fusion":
        return full
    body = whole.computations[user.called("calls")]
    return _used_by_all(whole, body, body.parameter(number), full)


def _used_by_all(whole: Module, body: Computation, name: str, full: int) -> int:
    total = 0
    for user in body.users(name):
        if user.opcode == "bitcast":
            total += _used_by_all(whole, body, user.name, full)
        else:
            numbers = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_used(whole, user, i, full) for i in numbers)
    return total


def _written(whole: Module, instruction: Instruction, computation: Computation) -> int:
    results = instruction.shapes
    places = _roots(whole, computation, instruction)
    if len(places) != len(results):
        return sum(shape.padded for shape in results if shape.in_hbm)
    return sum(
        shape.padded if place is None else min(place, shape.padded)
        for shape, place in zip(results, places, strict=True)
        if shape.in_hbm
    )


def _roots(whole: Module, computation: Computation, x: Instruction) -> list[int | None]:
    """Of each result, the bytes written where it is an update in place; None: all of it."""
    if x.opcode in ("dynamic-update-slice", "scatter"):
        update = computation.instructions[x.operands[1 if x.opcode[0] == "d" else 2]]
        return [update.shapes[0].padded]
    if x.opcode == "fusion":
        body = whole.computations[x.called("calls")]
        return _roots(whole, body, body.instructions[body.root])
    if x.opcode == "bitcast":
        return _roots(whole, computation, computation.instructions[x.operands[0]])
    if x.opcode == "tuple":
        found = (computation.instructions[name] for name in x.operands)
        return [place for y in found for place in _roots(whole, computation, y)[:1]]
    if x.opcode == "parameter" or x.opcode in COLLECTIVES:
        return [0]  # handed on, as above
    return [None]


# ---- collectives


def collectives(
    whole: Module, runs: Sequence[Run], where: Callable[[Instruction], str]
) -> list[dict[str, Any]]:
    """The collectives of what is run: kind; bytes of the whole array each time (the larger of what
    goes in and comes out); devices in a group; times; source line, which `where` tells; fused (done
    bit by bit in other fusions, all of which name its channel)."""
    found, channels = [], set()
    for run in runs:
        inside = hlo_parser.inner(whole, run.instruction)
        for x, computation in [(run.instruction, run.computation), *inside]:
            kind = x.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            fused, channel = x is not run.instruction, re.search(r"channel_id=(\d+)", x.rest)
            if fused and channel and channel[1] in channels:
                continue
            channels |= {channel[1]} if fused and channel else set()
            group = group_size(x.rest)
            taken = sum(shape.size for shapes in computation.shapes(x) for shape in shapes)
            size = taken * (group or 1) if kind == "all-gather" else taken
            one = dict(kind=kind, bytes=size, group=group, times=run.times, source=where(x))
            found.append(one | {"fused": fused})
    return found


def group_size(rest: str) -> int | None:
    """Devices that take part in a collective together, from its `replica_groups`; None: all."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    return None
