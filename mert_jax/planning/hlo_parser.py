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


class Program(NamedTuple):
    """Computations by name; `frames` maps a stack frame to its caller's and its "file:line"."""

    computations: dict[str, "Computation"]
    frames: dict[int, tuple[int, str]]


@dataclass(eq=False, slots=True)
class Instruction:
    """One line of the text, linked to its operands.

    shapes: arrays of the result, those of a tuple flattened. rest: the text after the operands.
    literal: the value of a constant, the number of a parameter.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: list["Instruction"]
    rest: str
    literal: str
    program: Program

    def attribute(self, pattern: str) -> str:
        """Return the first group of a regular expression in `rest`, "" without a match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    def called(self, name: str) -> "Computation":
        """Return the computation that an attribute such as "body" names."""
        return self.program.computations[self.attribute(rf"\b{name}=%?([\w.\-]+)")]

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate, 0 without one."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    def source(self, inside: str) -> str:
        """Return the innermost "file:line" in a file that begins with `inside`, else of all."""
        frame, places = int(self.attribute(r"stack_frame_id=(\d+)") or 0), []
        while frame in self.program.frames:
            frame, place = self.program.frames[frame]
            places.append(place)
        own = [place.removeprefix(inside) for place in places if place.startswith(inside)]
        return next(iter(own or places), "")

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
    program, entry = Program({}, _stack_frames(text)), None
    for is_entry, name, body in _COMPUTATION.findall(text):
        names, root = {}, None
        for is_root, each, rest in _INSTRUCTION.findall(body):
            names[each] = _parse_instruction(each, rest, program)
            root = names[each] if is_root else root
        for x in names.values():
            x.operands = [names[operand] for operand in x.operands if operand in names]
        program.computations[name] = Computation([*names.values()], root)
        entry = program.computations[name] if is_entry else entry
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return entry


def _parse_instruction(name: str, text: str, program: Program) -> Instruction:
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
    operands = re.findall(r"%([\w.\-]+)", arguments)  # linked when all names are known
    literal = "" if operands else arguments
    return Instruction(name, opcode[1], shapes, operands, text[end:], literal, program)


def _stack_frames(text: str) -> dict[int, tuple[int, str]]:
    files = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("\nFunctionNames\n")[0], re.M))
    lines = re.findall(r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)", text, re.M)
    places = {location: f"{files[file]}:{line}" for location, file, line in lines}
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", text, re.M)
    # the text counts callers from 1, with 1 for none
    return {int(frame): (int(caller or 1) - 1, places[at]) for frame, at, caller in frames}


def executed(computation: Computation, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Yield what a step executes and how often, loop bodies as often as they run.

    A fusion is one instruction. Of a conditional's branches, the one with the most cycles counts; a
    loop whose number of trips is unknown counts once.
    """
    for x in computation.instructions:
        yield x, times
        if x.opcode == "while":
            trips = trip_count(x)
            yield from executed(x.called("body"), times * (1 if trips is None else trips))
        elif x.opcode in ("call", "async-start"):
            yield from executed(x.called("to_apply" if x.opcode == "call" else "calls"), times)
        elif x.opcode == "conditional":
            names = re.findall(r"[\w.\-]+", x.attribute(r"branch_computations=\{([^}]*)\}"))
            branches = [x.program.computations[name] for name in names]
            branches = branches or [x.called(f"{k}_computation") for k in ("true", "false")]
            most = max(branches, key=lambda branch: sum(y.cycles for y in branch.instructions))
            yield from executed(most, times)


def trip_count(loop: Instruction) -> int | None:
    """Return how often the body of a while loop runs, None if the text does not tell.

    The TPU compiler does not write it down: it follows from the condition (counter < limit), the
    counter's first value, and what the body adds to it.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    test, (start,), root = loop.called("condition").root, loop.operands, loop.called("body").root
    initial = start.operands if start.opcode == "tuple" else []

    def first_value(x: Instruction) -> int | None:
        index = _tuple_index(x)
        return _integer(x if index is None or index >= len(initial) else initial[index])

    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, (begin, end) = _tuple_index(test.operands[0]), map(first_value, test.operands)
    if None in (counter, begin, end):
        return None
    added = root.operands[counter] if root.opcode == "tuple" else root
    # a counter fused with other sums: all loops of that kind seen so far count by one
    steps = map(_integer, added.operands) if added.opcode == "add" else ()
    return max(-(-(end - begin) // next(filter(None, steps), 1)), 0)


def _origin(x: Instruction) -> Instruction:
    return _origin(x.operands[0]) if x.opcode in _COPIES else x


def _integer(x: Instruction) -> int | None:
    x = _origin(x)
    return int(x.literal) if x.opcode == "constant" and x.literal.lstrip("-").isdigit() else None


def _tuple_index(x: Instruction) -> int | None:
    x = _origin(x)
    return int(x.attribute(r"index=(\d+)")) if x.opcode == "get-tuple-element" else None
