"""Optimised HLO text as data: computations, instructions, and how often each one runs.

The text is what `Compiled.as_text()` returns. Instructions: openxla.org/xla/operation_semantics;
layouts in memory: openxla.org/xla/tiled_layout.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{\n((?:[^}].*\n)*)\}", re.M)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.M)
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
        digits = re.search(r"\d+", self.dtype)  # f8e4m3, u4; a token has none
        bits = 8 if self.dtype == "pred" else int(digits[0]) if digits else 0
        return -(-math.prod(self.dims) * bits // 8)

    @property
    def padded(self) -> int:
        """Bytes in memory, padded to whole tiles."""
        dims, (order, _, tiles) = list(self.dims), self.layout.partition(":")
        lengths = (re.match(r"T\(([\d,]+)\)", tiles) or [0, "1"])[1].split(",")
        fastest_first = [int(axis) for axis in order.split(",") if axis]
        for length, axis in zip(map(int, reversed(lengths)), fastest_first, strict=False):
            dims[axis] = -(-dims[axis] // length) * length
        return self._replace(dims=tuple(dims)).size

    @property
    def in_hbm(self) -> bool:
        """True if the array is in HBM: S(1) is VMEM, scalars are in registers."""
        return bool(self.dims) and not re.search(r"S\([1-9]", self.layout)


@dataclass(eq=False, slots=True)
class Instruction:
    """One line of the text, linked to its operands.

    shapes: arrays of the result, those of a tuple flattened. rest: the text after the operands.
    literal: the value of a constant, the number of a parameter. stack: "file:line", inner first.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: list["Instruction"]
    rest: str
    literal: str
    stack: list[str]
    computations: dict[str, "Computation"]

    def attribute(self, pattern: str) -> str:
        """Return the first group of a regular expression in `rest`, "" without a match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    def called(self, name: str) -> "Computation":
        """Return the computation that an attribute such as "body" names."""
        return self.computations[self.attribute(rf"\b{name}=%?([\w.\-]+)")]

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate, 0 without one."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    def unfused(self) -> Iterator["Instruction"]:
        """Yield this instruction and, if it is a fusion, those inside it."""
        yield self
        if self.opcode == "fusion":
            for inside in self.called("calls").instructions:
                yield from inside.unfused()


class Computation(NamedTuple):
    """Instructions in order, and the one whose result is returned."""

    instructions: list[Instruction]
    root: Instruction


def parse(text: str) -> Computation:
    """Return the entry computation of an HLO text. Raises ValueError if it has none."""
    stacks, computations, entry = _parse_stacks(text), {}, None
    for is_entry, name, body in _COMPUTATION.findall(text):
        instructions, root = {}, None
        for is_root, each, line in _INSTRUCTION.findall(body):
            instructions[each] = x = _parse_instruction(each, line)
            x.computations, root = computations, x if is_root else root
            x.stack = stacks.get(x.attribute(r"stack_frame_id=(\d+)"), [])
        for x in instructions.values():
            x.operands = [instructions[name] for name in x.operands if name in instructions]
        computations[name] = Computation([*instructions.values()], root)
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return entry


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
    operands = re.findall(r"%([\w.\-]+)", arguments)  # `parse` links them
    literal = "" if operands else arguments
    return Instruction(name, opcode[1], shapes, operands, text[end:], literal, [], {})


def _parse_stacks(text: str) -> dict[str, list[str]]:
    files = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("\nFunctionNames\n")[0], re.M))
    lines = re.findall(r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)", text, re.M)
    places = {location: f"{files[file]}:{line}" for location, file, line in lines}
    stacks = {}
    frames = r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    for frame, location, caller in re.findall(frames, text, re.M):
        # the text counts callers from 1, with 1 for none
        stacks[frame] = [places[location], *stacks.get(str(int(caller or 1) - 1), [])]
    return stacks


def executed(computation: Computation, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Yield what a step executes, fusions as one instruction, and how often.

    Of the branches of a conditional, the one with the most cycles counts.
    """
    for x in computation.instructions:
        yield x, times
        if x.opcode == "while":
            trips = trip_count(x)  # once if unknown
            yield from executed(x.called("body"), times * (1 if trips is None else trips))
        elif x.opcode in ("call", "async-start"):
            yield from executed(x.called("to_apply" if x.opcode == "call" else "calls"), times)
        elif x.opcode == "conditional":
            names = re.findall(r"[\w.\-]+", x.attribute(r"branch_computations=\{([^}]*)\}"))
            branches = [x.computations[name] for name in names]
            branches = branches or [x.called(f"{k}_computation") for k in ("true", "false")]
            most = max(branches, key=lambda branch: sum(y.cycles for y in branch.instructions))
            yield from executed(most, times)


def trip_count(loop: Instruction) -> int | None:
    """Return how often the body of a while loop runs, None if the text does not tell."""
    # the TPU compiler does not write the number: it follows from the condition (counter < limit),
    # the counter's first value, and what the body adds to it
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    test, (start,), root = loop.called("condition").root, loop.operands, loop.called("body").root
    counter = _origin(test.operands[0])
    if "direction=LT" not in test.rest or counter.opcode != "get-tuple-element":
        return None

    def first_value(x: Instruction) -> int | None:
        x = _origin(x)
        carried = x.opcode == "get-tuple-element" and start.opcode == "tuple"
        return _integer(start.operands[_index(x)] if carried else x)

    begin, end = map(first_value, test.operands)
    if begin is None or end is None:
        return None
    added = root.operands[_index(counter)] if root.opcode == "tuple" else root
    # a counter fused with other sums: all loops of that kind seen so far count by one
    steps = map(_integer, added.operands) if added.opcode == "add" else ()
    return max(-(-(end - begin) // next(filter(None, steps), 1)), 0)


def _origin(x: Instruction) -> Instruction:
    return _origin(x.operands[0]) if x.opcode in _COPIES else x


def _index(x: Instruction) -> int:
    return int(x.attribute(r"index=(\d+)"))


def _integer(x: Instruction) -> int | None:
    x = _origin(x)
    return int(x.literal) if x.opcode == "constant" and x.literal.lstrip("-").isdigit() else None
