"""Optimised HLO text as data: computations, instructions, and how often each one runs.

The text is what `Compiled.as_text()` returns. Instructions: openxla.org/xla/operation_semantics;
layouts in memory: openxla.org/xla/tiled_layout.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=[)\]}]) ([a-z][\w\-]*)\(")
# operations that return the integers of their operand
_COPIES = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


class Shape(NamedTuple):
    """The element type, dimensions and layout (as written) of an array."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Bytes of the elements."""
        if self.dtype in ("token", "opaque"):
            return 0
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])  # f8e4m3, u4
        return -(-math.prod(self.dims) * bits // 8)

    @property
    def padded(self) -> int:
        """Bytes in memory, padded to whole tiles."""
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if not tile:
            return self.size
        dims = list(self.dims)
        fastest_first = [int(axis) for axis in order.split(",") if axis]
        for length, axis in zip(reversed(tile[1].split(",")), fastest_first, strict=False):
            dims[axis] = -(-dims[axis] // int(length)) * int(length)
        return self._replace(dims=tuple(dims)).size

    @property
    def in_hbm(self) -> bool:
        """True if the array is in HBM: S(1) is VMEM, scalars are in registers."""
        return bool(self.dims) and not re.search(r"S\([1-9]", self.layout)


class Instruction(NamedTuple):
    """One line of the text.

    shapes: arrays of the result, those of a tuple flattened. rest: the text after the operands.
    literal: the value of a constant, the number of a parameter.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    literal: str = ""

    def attribute(self, pattern: str) -> str:
        """Return the first group of a regular expression in `rest`, "" without a match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    def called(self, name: str) -> str:
        """Return the computation that an attribute such as "body" names, "" without one."""
        return self.attribute(rf"\b{name}=%?([\w.\-]+)")

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate, 0 without one."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def op_name(self) -> str:
        """Place in the traced program, such as "jit(train_step)/.../dot_general"."""
        return self.attribute(r'op_name="([^"]*)"')


class Computation(NamedTuple):
    """Instructions by name, in order; `root` names the one that is returned."""

    instructions: dict[str, Instruction]
    root: str

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """Return the shapes of each operand."""
        operands = (self.instructions.get(name) for name in instruction.operands)
        return [operand.shapes if operand else () for operand in operands]

    def origin(self, name: str) -> Instruction | None:
        """Return the instruction that computes `name`, behind copies of it."""
        instruction = self.instructions.get(name)
        while instruction and instruction.opcode in _COPIES:
            instruction = self.instructions.get(instruction.operands[0])
        return instruction

    def integer(self, name: str) -> int | None:
        """Return the value of an integer constant, None for anything else."""
        origin = self.origin(name)
        is_integer = origin and origin.opcode == "constant" and origin.literal.lstrip("-").isdigit()
        return int(origin.literal) if is_integer else None

    def tuple_index(self, name: str) -> int | None:
        """Return the index of an element taken from a tuple, None for anything else."""
        origin = self.origin(name)
        is_element = origin and origin.opcode == "get-tuple-element"
        return int(origin.attribute(r"index=(\d+)")) if is_element else None


class Run(NamedTuple):
    """An executed instruction, its computation, and how many times it runs in a step."""

    instruction: Instruction
    computation: Computation
    times: int


class Module(NamedTuple):
    """A program; `frames` maps a stack frame to (its caller's frame, file, line)."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[int, str, int]]

    def source(self, instruction: Instruction, inside: str = "") -> str:
        """Return the "file:line" that an instruction comes from, "" if the text does not say.

        The innermost stack frame in a file that begins with `inside`, else the innermost of all.
        """
        frame, innermost = int(instruction.attribute(r"stack_frame_id=(\d+)") or 0), ""
        while frame in self.frames:
            frame, file, line = self.frames[frame]
            innermost = innermost or f"{file}:{line}"
            if inside and file.startswith(inside):
                return f"{file.removeprefix(inside)}:{line}"
        return innermost


def parse(text: str) -> Module:
    """Return the program of an HLO text. Raises ValueError if it has no entry computation."""
    computations, entry, name, instructions, root = {}, None, None, {}, ""
    for line in text.splitlines():
        if name is None:
            if (head := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                name, instructions, root = head[2], {}, ""
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(instructions, root)
            name = None
        elif match := _INSTRUCTION.match(line):
            instructions[match[2]] = _parse_instruction(match[2], match[3])
            root = match[2] if match[1] else root
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(computations, entry, _stack_frames(text))


def _parse_instruction(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    depth, end = 1, opcode.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    arguments = text[opcode.end() : end - 1]
    shapes = tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _SHAPE.findall(text[: opcode.start()])
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode[1], shapes, operands, text[end:], "" if operands else arguments)


def _stack_frames(text: str) -> dict[int, tuple[int, str, int]]:
    def table(name: str) -> dict[int, str]:
        lines = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return {int(n): row for n, row in re.findall(r"(\d+) (.*)", lines[1])} if lines else {}

    def numbers(row: str) -> dict[str, int]:
        return {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", row)}

    files, locations, frames = table("FileNames"), table("FileLocations"), {}
    for frame, row in table("StackFrames").items():
        fields = numbers(row)
        location = numbers(locations[fields["file_location_id"]])
        file = files[location["file_name_id"]].strip('"')
        # the text counts callers from 1, with 1 for none
        frames[frame] = (fields.get("parent_frame_id", 1) - 1, file, location["line"])
    return frames


def executed(module: Module) -> list[Run]:
    """Return what a step executes, loop bodies as often as they run.

    A fusion is one instruction. Of a conditional's branches, the one with the most cycles counts; a
    loop whose number of trips is unknown counts once.
    """
    runs = []

    def cycles(name: str) -> int:
        return sum(x.cycles for x in module.computations[name].instructions.values())

    def walk(name: str, times: int) -> None:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            run = Run(instruction, computation, times)
            runs.append(run)
            if instruction.opcode == "while":
                trips = trip_count(module, run)
                walk(instruction.called("body"), times * (1 if trips is None else trips))
            elif instruction.opcode == "call":
                walk(instruction.called("to_apply"), times)
            elif instruction.opcode == "async-start":
                walk(instruction.called("calls"), times)
            elif instruction.opcode == "conditional":
                listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
                branches = re.findall(r"%?([\w.\-]+)", listed) or [
                    instruction.called(f"{kind}_computation") for kind in ("true", "false")
                ]
                walk(max(branches, key=cycles), times)

    walk(module.entry, 1)
    return runs


def unfused(
    module: Module, instruction: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation]]:
    """Yield an instruction and, if it is a fusion, those inside it, each with its computation."""
    yield instruction, computation
    if instruction.opcode == "fusion" and (name := instruction.called("calls")):
        body = module.computations[name]
        for inside in body.instructions.values():
            yield from unfused(module, inside, body)


def trip_count(module: Module, run: Run) -> int | None:
    """Return how often the body of a while loop runs, None if the text does not tell.

    The TPU compiler does not write it down: it follows from the condition (counter < limit), the
    counter's first value, and what the body adds to it.
    """
    loop, around = run.instruction, run.computation
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    test, start = condition.instructions[condition.root], around.instructions.get(loop.operands[0])
    initial = start.operands if start and start.opcode == "tuple" else ()
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    values = []  # of the counter and the limit: an initial element of the loop, or a constant
    counter = condition.tuple_index(test.operands[0])
    for name in test.operands:
        index = condition.tuple_index(name)
        carried = index is not None and index < len(initial)
        values.append(around.integer(initial[index]) if carried else condition.integer(name))
    if counter is None or None in values:
        return None
    begin, end = values
    return max(-(-(end - begin) // _increment(body, counter)), 0)


def _increment(body: Computation, counter: int) -> int:
    root = body.instructions[body.root]
    added = body.instructions.get(root.operands[counter]) if root.opcode == "tuple" else None
    if added and added.opcode == "add":
        return next((n for n in map(body.integer, added.operands) if n), 1)
    return 1  # fused with other sums: all loops of that kind seen so far count by one
