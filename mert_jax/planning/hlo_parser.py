"""Optimised HLO text as data: computations, instructions, and how often each one runs.

The text is what `Compiled.as_text()` gives. Meanings: openxla.org/xla/operation_semantics, and
openxla.org/xla/tiled_layout for how arrays lie in memory.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=[)\]}]) ([a-z][\w\-]*)\(")
_BITS = re.compile(r"\d+")


class Shape(NamedTuple):
    """An array's element type, dimensions, and its layout as the text says it."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Bytes of its elements."""
        return _bytes(self.dtype, math.prod(self.dims))

    @property
    def padded(self) -> int:
        """Bytes it takes, padded to whole tiles."""
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if not tile:
            return self.size
        dims, sizes = list(self.dims), [int(n) for n in tile[1].split(",")]
        minor = [int(i) for i in order.split(",") if i]  # dimensions, the fastest first
        for size, axis in zip(reversed(sizes), minor, strict=False):
            dims[axis] = -(-dims[axis] // size) * size
        return _bytes(self.dtype, math.prod(dims))

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory: a TPU has S(1), VMEM, and smaller ones, and
        keeps scalars in registers."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return bool(self.dims) and (not space or space[1] == "0")


def _bytes(dtype: str, elements: int) -> int:
    if dtype in ("token", "opaque"):
        return 0
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])  # f32, bf16, f8e4m3fn, u4
    return -(-elements * bits // 8)


class Instruction(NamedTuple):
    """One line: `shapes` are the arrays of its result (one, or those of a tuple, flattened);
    `rest` is what follows the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    literal: str = ""  # of a constant, and a parameter's number

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as "body" names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate, 0 where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from, such as "jit(train_step)/.../dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in order; `root` names the one that is returned."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """Of each operand."""
        found = (self.instructions.get(name) for name in instruction.operands)
        return [operand.shapes if operand else () for operand in found]

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read `name`."""
        return [x for x in self.instructions.values() if name in x.operands]

    def parameter(self, number: int) -> str | None:
        """The name of a parameter."""
        return next(
            (
                x.name
                for x in self.instructions.values()
                if x.opcode == "parameter" and x.literal == str(number)
            ),
            None,
        )


class Run(NamedTuple):
    """An instruction that is executed, where it stands, and how many times a step."""

    instruction: Instruction
    computation: Computation
    times: int


class Loop(NamedTuple):
    """A while loop; `trips` is None where the text does not tell, and then counted as 1."""

    instruction: Instruction
    trips: int | None
    times: int


class Module(NamedTuple):
    """A whole module; `frames`: stack frame -> (its caller's frame, file, line)."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[int, str, int]]

    def source(self, instruction: Instruction, inside: str = "") -> str:
        """The line "file:line" an instruction comes from: the innermost of its stack in a file
        that begins with `inside`, or else the innermost of all; "" where the text does not say."""
        inline = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.rest)
        if inline:
            return f"{inline[1].removeprefix(inside)}:{inline[2]}"
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        frame, first = int(found[1]) if found else 0, ""
        for _ in self.frames:
            if frame not in self.frames:
                break
            frame, file, line = self.frames[frame]
            first = first or f"{file}:{line}"
            if inside and file.startswith(inside):
                return f"{file.removeprefix(inside)}:{line}"
        return first


def parse(text: str) -> Module:
    """The program of HLO `text`; ValueError where there is none."""
    computations, entry, name, body, root = {}, None, None, {}, ""
    for line in text.splitlines():
        if name is None:
            if (head := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                name, body, root = head[2], {}, ""
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, body, root)
            name = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3])
            body[instruction.name] = instruction
            root = instruction.name if found[1] else root
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(computations, entry, _frames(text))


def _instruction(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    depth, end = 1, opcode.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    inside = text[opcode.end() : end - 1]
    shapes = tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _SHAPE.findall(text[: opcode.start()])
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode[1], shapes, operands, text[end:], "" if operands else inside)


def _frames(text: str) -> dict[int, tuple[int, str, int]]:
    tables = {name: _table(text, name) for name in ("FileNames", "FileLocations", "StackFrames")}
    numbers = lambda row: {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", row)}
    frames = {}
    for frame, row in tables["StackFrames"].items():
        at = numbers(row)
        place = numbers(tables["FileLocations"][at["file_location_id"]])
        file = tables["FileNames"][place["file_name_id"]].strip('"')
        # the text counts a caller from 1, with 1 for none
        frames[frame] = (at.get("parent_frame_id", 1) - 1, file, place["line"])
    return frames


def _table(text: str, name: str) -> dict[int, str]:
    start = re.search(rf"^{name}\n", text, re.MULTILINE)
    rows = {}
    for line in text[start.end() :].split("\n") if start else ():
        number, _, row = line.partition(" ")
        if not number.isdigit():
            break
        rows[int(number)] = row
    return rows


def executed(module: Module) -> tuple[list[Run], list[Loop]]:
    """What a step executes, loop bodies as often as they run, and the loops.

    A fusion is one instruction. Of a conditional's branches, the one with the most cycles counts.
    """
    runs, loops = [], []

    def walk(name: str, times: int) -> None:
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            runs.append(Run(instruction, computation, times))
            if instruction.opcode == "while":
                trips = trip_count(module, computation, instruction)
                loops.append(Loop(instruction, trips, times))
                walk(instruction.called("body"), times * (1 if trips is None else trips))
            elif instruction.opcode == "call":
                walk(instruction.called("to_apply"), times)
            elif instruction.opcode == "async-start":
                walk(instruction.called("calls"), times)
            elif instruction.opcode == "conditional":
                walk(max(_branches(instruction), key=lambda b: _cycles(module, b)), times)

    walk(module.entry, 1)
    return runs, loops


def _branches(conditional: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", conditional.rest):
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [conditional.called(f"{kind}_computation") for kind in ("true", "false")]


def _cycles(module: Module, name: str) -> int:
    return sum(x.cycles for x in module.computations[name].instructions.values())


def inner(module: Module, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
    """The instructions inside a fusion, and inside the fusions in it."""
    called = instruction.called("calls") if instruction.opcode == "fusion" else None
    for x in module.computations[called].instructions.values() if called else ():
        yield x, module.computations[called]
        yield from inner(module, x)


def trip_count(module: Module, around: Computation, loop: Instruction) -> int | None:
    """How often a while loop's body runs, None where the text does not tell.

    The TPU compiler does not write it down: it follows from the loop's condition (counter < limit),
    the counter's first value and what the body adds to it.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(found[1])
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    test, first, last = condition.instructions[condition.root], None, None
    start = around.instructions.get(loop.operands[0])
    starts = start.operands if start and start.opcode == "tuple" else ()
    initial = lambda i: _constant(around, starts[i]) if i < len(starts) else None
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter = _element(condition, test.operands[0])
    if counter is None:
        return None
    first, last = initial(counter), _constant(condition, test.operands[1])
    limit = _element(condition, test.operands[1])
    if last is None and limit is not None:  # a limit that the loop carries along
        last = initial(limit)
    if first is None or last is None:
        return None
    return max(-(-(last - first) // _increment(body, counter)), 0)


def _increment(body: Computation, counter: int) -> int:
    root = body.instructions[body.root]
    added = body.instructions.get(root.operands[counter]) if root.opcode == "tuple" else None
    if added and added.opcode == "add":
        known = [_constant(body, name) for name in added.operands]
        return next((n for n in known if n), 1)
    return 1  # fused with other sums: every loop seen of that kind counts by one


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


def _constant(computation: Computation, name: str) -> int | None:
    x = computation.instructions.get(name)
    while x and x.opcode in _SAME:
        x = computation.instructions.get(x.operands[0])
    if x and x.opcode == "constant" and re.fullmatch(r"-?\d+", x.literal):
        return int(x.literal)
    return None


def _element(computation: Computation, name: str) -> int | None:
    x = computation.instructions.get(name)
    while x and x.opcode in _SAME:
        x = computation.instructions.get(x.operands[0])
    if x and x.opcode == "get-tuple-element":
        return int(re.search(r"index=(\d+)", x.rest)[1])
    return None


@functools.lru_cache(maxsize=4)
def parsed(text: str) -> Module:
    """`parse`, once for the same text."""
    return parse(text)
