"""Reads the text of an optimized XLA program: its computations, their instructions, the trips of its loops.

The text is what ``jax.stages.Compiled.as_text`` gives. A computation's instructions stand in the order in which they
run.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_HEAD = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{")
_BEGIN = re.compile(r"  (ROOT )?%?([^\s=]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in the program.
        type: of its result, as XLA writes it: ``f32[4,512]{1,0}``, or several in parentheses.
        opcode: what it does, such as ``fusion``.
        operands: names of the instructions whose results it takes; of a constant, its text.
        attributes: the rest of its text.
        root: whether its result is its computation's.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return type_bytes(self.type)

    @property
    def cycles(self) -> int | None:
        """What the compiler says that it costs on a TPU; None where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def attribute(self, name: str) -> str | None:
        """The value of an attribute, up to the next comma or blank, such as of ``direction=LT`` or ``calls=%fused``."""
        found = re.search(rf'\b{name}="?([^,\s"]+)', self.attributes)
        return found[1].lstrip("%") if found else None

    def called(self) -> list[str]:
        """The computations that it runs as part of itself, none of those that reductions apply to pairs of numbers."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            return [name.strip().lstrip("%") for name in branches[1].split(",")]
        keys = ("calls", "body", "true_computation", "false_computation")
        found = [self.attribute(key) for key in (*keys, "to_apply") if key != "to_apply" or self.opcode == "call"]
        return [name for name in found if name]


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions, to be looked up."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(instruction for instruction in self.instructions if instruction.root)

    def source(self, name: str) -> Instruction:
        """The instruction that made a value, behind copies of it."""
        found = self.by_name[name]
        while found.opcode in ("copy", "bitcast") and found.operands[0] in self.by_name:
            found = self.by_name[found.operands[0]]
        return found


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        entry: the computation that runs first.
        computations: all of them, by name.
        aliases: how many of its arguments' buffers it takes for results, because they are donated.
    """

    entry: Computation
    computations: dict[str, Computation]
    aliases: int

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """How often the body of a ``while`` runs; None where the program does not show it.

        XLA writes the number beside some loops. Of others it is read from the loop itself: from where a counter begins,
        by how much it grows, and the number that it stays below.
        """
        found = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
        if found:
            return int(found[1])
        condition = self.computations[loop.attribute("condition") or ""]
        body = self.computations[loop.attribute("body") or ""]
        test = condition.root
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, limit = (condition.source(name) for name in test.operands)
        index = counter.attribute("index")
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant" or index is None:
            return None
        begin = self._element(within, loop.operands[0], int(index))
        step = self._element(body, body.root.name, int(index))
        if begin is None or step is None or begin.opcode != "constant" or step.opcode != "add":
            return None
        parts = [body.source(name) for name in step.operands]
        growth = [part for part in parts if part.opcode == "constant"]
        counted = [part for part in parts if part.attribute("index") == index]
        if len(growth) != 1 or len(counted) != 1:
            return None
        return max(0, math.ceil((int(limit.operands[0]) - int(begin.operands[0])) / int(growth[0].operands[0])))

    def _element(self, computation: Computation, name: str, index: int) -> Instruction | None:
        """What made one element of a tuple."""
        found = computation.source(name)
        return computation.source(found.operands[index]) if found.opcode == "tuple" else None

    def nested(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of the computations that an instruction calls, and of those that they call."""
        for name in instruction.called():
            for inner in self.computations[name].instructions:
                yield inner
                yield from self.nested(inner)


def parse_program(text: str) -> Program:
    """Reads a program.

    Raises:
        ValueError: if the text is not of a form that this module knows.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    instructions: list[str] = []
    for line in text.splitlines():
        head = _HEAD.fullmatch(line)
        if head and not name:
            name, instructions = head[2], []
            entry = name if head[1] else entry
        elif line == "}" and name:
            computations[name] = Computation(name, tuple(map(_instruction, instructions)))
            name = ""
        elif name and _BEGIN.match(line):
            instructions.append(line)
        elif name:  # some attributes have line breaks in them
            instructions[-1] += "\n" + line
    if not entry:
        raise ValueError("the program has no entry")
    header = text.partition("\n")[0]
    return Program(computations[entry], computations, len(re.findall(r"(?:may|must)-alias", header)))


def _instruction(text: str) -> Instruction:
    begin = _BEGIN.match(text)
    assert begin
    at = begin.end()
    end = _closing(text, at) if text[at] == "(" else text.index(" ", at)
    call = re.compile(r"\s*([a-z][\w-]*)(?=\()").match(text, end)
    if call is None:
        raise ValueError(f"not an instruction of a known form: {text[:200]}")
    stop = _closing(text, call.end())
    inside = text[call.end() + 1 : stop - 1]
    operands = (inside,) if call[1] == "constant" else tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(begin[2], text[at:end], call[1], operands, text[stop:], bool(begin[1]))


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at ``start``."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 200]}")


def shapes(type_: str) -> list[tuple[int, tuple[int, ...]]]:
    """The arrays of a type: bits of an element, and dimensions. Tokens, which hold no data, are left out."""
    found = []
    for name, dimensions in _SHAPE.findall(type_):
        bits = 8 if name == "pred" else int((re.search(r"\d+", name) or ["0"])[0])
        if bits:
            found.append((bits, tuple(int(size) for size in dimensions.split(",") if size)))
    return found


def type_bytes(type_: str) -> int:
    """Bytes of the arrays of a type, without the padding of their layouts."""
    return sum(bits * math.prod(dimensions) for bits, dimensions in shapes(type_)) // 8


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of devices that take part in a collective together, one in each row, by their places in the mesh.

    XLA writes them one by one, ``{{0,1},{2,3}}``; as a shape with its axes in another order, ``[2,2]<=[2,2]T(1,0)``; or
    as axes of a mesh, ``mesh['a'=2,'b'=2] {'b'}``, where ``'a':(2)4`` is the part of an axis that has 4 devices and
    stands behind a part that has 2.

    Raises:
        ValueError: if they are written in another way.
    """
    found = re.search(r"replica_groups=(.*?)(?:, [a-z_]+=|$)", attributes, re.DOTALL)
    text = found[1].strip() if found else "{}"
    if text == "{}":
        return np.arange(devices)[None]
    if text.startswith("{{"):
        return np.array(json.loads(text.replace("{", "[").replace("}", "]")))
    iota = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        ids = np.arange(devices).reshape(_numbers(iota[2]))
        return (ids.transpose(_numbers(iota[3])) if iota[3] else ids).reshape(_numbers(iota[1]))
    mesh = re.fullmatch(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh is None:
        raise ValueError(f"replica groups of an unknown form: {text[:200]}")
    return _groups_of_axes(mesh[1], mesh[2], devices)


def _groups_of_axes(mesh: str, axes: str, devices: int) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {name: [size] for name, size in sizes.items()}
    chosen = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        if size:
            parts[name] = [int(before), int(size), sizes[name] // int(before) // int(size)]
        chosen.append((name, 1 if size else 0))
    flat = [(name, index) for name, lengths in parts.items() for index in range(len(lengths))]
    order = sorted(range(len(flat)), key=lambda place: (flat[place] in chosen, place))
    ids = np.arange(devices).reshape([parts[name][index] for name, index in flat]).transpose(order)
    return ids.reshape(-1, math.prod(parts[name][index] for name, index in chosen))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
