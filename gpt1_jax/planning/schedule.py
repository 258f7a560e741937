"""The time that a compiled TPU program takes, from its own order of instructions.

One clock runs through the instructions of each computation. What the compiler has written a cost to takes that long.
Transfers that it starts early go on beside the arithmetic, one after another on each of three ways (memory, links
between chips, network between slices), and the clock waits for one where its result is first needed. So the parts of a
step add up to the whole, and what is hidden behind arithmetic is not counted twice.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt1_jax.planning.hlo import Computation, Instruction, Program, replica_groups, type_bytes
from gpt1_jax.planning.kernels import KERNEL, SHARE_OF_PEAK, kernel_flops, moved_bytes
from gpt1_jax.planning.network import COLLECTIVES, link_seconds, slice_seconds
from gpt1_jax.planning.topologies import Slice

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id domain "
    "opt-barrier optimization-barrier add-dependency send recv".split()
)
_FREE_CALLS = frozenset(
    {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "SliceId", "Sharding", "ZeroCrop"}
)


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind, all of a step together.

    Attributes:
        kind: such as ``all-reduce``.
        network: ``links`` within a slice, or ``slices`` between them.
        in_loop: whether they are in a loop, such as that of the layers, and not outside all of them.
        count: how many.
        bytes: of a chip: the arrays before or after, whichever are larger.
        seconds: an estimate, hidden behind arithmetic or not; None where the links are not known.
    """

    kind: str
    network: str
    in_loop: bool
    count: int
    bytes: int
    seconds: float | None


@dataclass
class Cost:
    """What a step, or a part of it, takes.

    Attributes:
        compute: seconds of the compiler's own estimates.
        kernels: seconds of kernels, an estimate.
        uncosted: seconds of instructions that the compiler gives no cost, an estimate from their bytes.
        waits: seconds in which the chip does nothing else, by what it waits for: ``memory``, ``links`` or ``slices``;
            estimates.
        costed: how many instructions have the compiler's estimate.
        unknown: what is not in the figures, because the program does not show it.
        uncounted: how many loops have trips that the program does not show, so that the time is not known.
    """

    compute: float = 0.0
    kernels: float = 0.0
    uncosted: float = 0.0
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    costed: int = 0
    unknown: set[str] = field(default_factory=set)
    uncounted: int = 0
    _exchanges: dict[tuple[str, str, bool], tuple[int, int, float | None]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The sum of the parts."""
        return self.compute + self.kernels + self.uncosted + sum(self.waits.values())

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The exchanges, the largest first."""
        found = [Collective(*key, *values) for key, values in self._exchanges.items()]
        return tuple(sorted(found, key=lambda exchange: (-exchange.bytes, exchange.kind)))

    def add(self, other: "Cost", times: int, in_loop: bool) -> None:
        """Adds another cost, as often as it occurs."""
        self.compute += times * other.compute
        self.kernels += times * other.kernels
        self.uncosted += times * other.uncosted
        for way, seconds in other.waits.items():
            self.waits[way] += times * seconds
        self.costed += other.costed
        self.unknown |= other.unknown
        self.uncounted += other.uncounted
        for (kind, way, inside), (count, size, seconds) in other._exchanges.items():
            total = None if seconds is None else times * seconds
            self.exchange(kind, way, in_loop or inside, times * count, times * size, total)

    def exchange(self, kind: str, network: str, in_loop: bool, count: int, size: int, seconds: float | None) -> None:
        """Adds exchanges of a kind."""
        before = self._exchanges.get((kind, network, in_loop), (0, 0, 0.0))
        total = None if seconds is None or before[2] is None else before[2] + seconds
        self._exchanges[kind, network, in_loop] = (before[0] + count, before[1] + size, total)


@dataclass(frozen=True)
class Device:
    """What a program is timed for.

    Attributes:
        count: how many run it.
        slice: their chips; None: they are not TPUs, and nothing is timed.
        coordinates: in its slice, of each chip of one slice, in the order of the mesh.
        peak_flops: of each.
    """

    count: int
    slice: Slice | None = None
    coordinates: Sequence[tuple[int, ...]] = ()
    peak_flops: float | None = None


def step_cost(program: Program, device: Device) -> Cost:
    """What a program takes, once through."""
    return _Walk(program, program.entry, device).cost


class _Walk:
    """One computation, walked through from its first instruction to its last."""

    def __init__(self, program: Program, computation: Computation, device: Device):
        self.cost = Cost()
        self._program = program
        self._computation = computation
        self._device = device
        self._chip = device.slice.chip if device.slice else None
        self._now = 0.0
        self._free: dict[str, float] = defaultdict(float)  # when each way is free again
        self._ready: dict[object, tuple[str, float]] = {}  # when what was started is there, and by which way it comes
        fused = _fused_collectives(program, computation)
        first = {names[0]: key for key, names in fused.items()}
        last = {names[-1]: key for key, names in fused.items()}
        inside = {name for names in fused.values() for name in names}
        for instruction in computation.instructions:
            if instruction.name in first:
                self._start_fused(instruction, first[instruction.name])
            self._step(instruction, instruction.name in inside)
            if instruction.name in last:
                self._wait(last[instruction.name])
        for key in list(self._ready):
            self._wait(key)

    def _step(self, instruction: Instruction, communicates: bool) -> None:
        opcode = instruction.opcode
        if opcode.endswith("-done"):
            self._wait(self._started(instruction))
        elif opcode.endswith("-start"):
            self._start(instruction)
        elif opcode in COLLECTIVES:
            self._exchange(instruction.name, opcode, instruction)
            self._wait(instruction.name)
        elif opcode == "send" and "megascale" in instruction.attributes:
            self._send(instruction)
        elif opcode == "while":
            self._loop(instruction)
        elif opcode in ("call", "conditional"):
            costs = [_Walk(self._program, c, self._device).cost for c in self._called(instruction)]
            self._take(max(costs, key=lambda cost: (cost.seconds, len(cost.collectives))), 1, False)
        elif opcode not in _FREE and not opcode.endswith("-update") and self._chip:
            self._run(instruction, communicates)

    def _run(self, instruction: Instruction, communicates: bool) -> None:
        """An instruction that keeps the chip busy."""
        assert self._chip
        cycles = instruction.cycles
        target = instruction.attribute("custom_call_target")
        if cycles is not None:
            seconds = cycles / self._chip.clock
            self.cost.compute += seconds
            self.cost.costed += 1
        elif target in _FREE_CALLS or communicates:
            return
        elif target == KERNEL:
            seconds = self._kernel_seconds(instruction)
            self.cost.kernels += seconds
        else:
            seconds = moved_bytes(instruction, self._operands(instruction)) / self._chip.hbm_bandwidth
            self.cost.uncosted += seconds
        self._now += seconds

    def _kernel_seconds(self, kernel: Instruction) -> float:
        assert self._chip
        operands = self._operands(kernel)
        seconds = moved_bytes(kernel, operands) / self._chip.hbm_bandwidth
        flops = kernel_flops(kernel, operands)
        if flops is None or self._device.peak_flops is None:
            self.cost.unknown.add(f"the arithmetic of the kernel {re.sub(r'[.0-9]+$', '', kernel.name)}")
            return seconds
        return max(seconds, flops / (SHARE_OF_PEAK * self._device.peak_flops))

    def _loop(self, loop: Instruction) -> None:
        body = self._program.computations[loop.attribute("body") or ""]
        trips = self._program.trips(loop, self._computation)
        if trips is None:
            self.cost.unknown.add(f"all but one trip of the loop {loop.name}")
            self.cost.uncounted += 1
        self._take(_Walk(self._program, body, self._device).cost, 1 if trips is None else trips, True)

    def _take(self, cost: Cost, times: int, in_loop: bool) -> None:
        self.cost.add(cost, times, in_loop)
        self._now += times * cost.seconds

    def _start(self, instruction: Instruction) -> None:
        """What goes on beside the instructions that follow: an exchange between chips, or a copy in memory."""
        base = instruction.opcode.removesuffix("-start")
        made = next((i for i in self._program.nested(instruction) if i.opcode in COLLECTIVES), None)
        if base in COLLECTIVES or made:
            self._exchange(instruction.name, made.opcode if made else base, instruction, made)
        elif self._chip:
            size = min(instruction.bytes, sum(operand.bytes for operand in self._operands(instruction)))
            self._issue(instruction.name, "memory", size / self._chip.hbm_bandwidth)

    def _start_fused(self, fusion: Instruction, key: tuple[str, str]) -> None:
        """An exchange whose parts the compiler has put into fusions, to go on beside what these compute."""
        made = next(i for i in self._program.nested(fusion) if _is_collective(i, fusion, key))
        self._exchange(key, key[0], fusion, made)

    def _exchange(self, key: object, kind: str, whole: Instruction, made: Instruction | None = None) -> None:
        """Puts an exchange on the links; ``made`` is the collective itself where another instruction wraps it."""
        collective = made or whole
        computation = self._computation
        if made is not None:
            computation = next(c for c in self._program.computations.values() if made.name in c.by_name)
        taken = sum(computation.by_name[name].bytes for name in collective.operands)
        result = type_bytes(re.sub(r"\bu32\[\]", "", collective.type))  # without the handles of what has started
        size = max(taken, result - taken if collective.opcode.endswith("-start") else result)
        seconds = None
        if self._device.slice:
            groups = replica_groups(collective.attributes, len(self._device.coordinates))
            group = [self._device.coordinates[index] for index in groups[0]]
            seconds = link_seconds(kind, size, group, self._device.slice)
            self._issue(key, "links", seconds)
        self.cost.exchange(kind, "links", False, 1, size, seconds)

    def _send(self, send: Instruction) -> None:
        """A chip's part of an exchange between slices, which the hosts make."""
        assert self._device.slice
        kind = (send.attribute("_xla_megascale_transfer_type") or "send").lower().replace("_", "-")
        size = self._computation.by_name[send.operands[0]].bytes
        seconds = slice_seconds(kind, size, self._device.slice)
        self._issue(_rendezvous(send), "slices", seconds)
        self.cost.exchange(kind, "slices", False, 1, size, seconds)

    def _issue(self, key: object, way: str, seconds: float) -> None:
        self._free[way] = max(self._now, self._free[way]) + seconds
        self._ready[key] = (way, self._free[way])

    def _wait(self, key: object) -> None:
        way, ready = self._ready.pop(key, ("", 0.0))
        if ready > self._now:
            self.cost.waits[way] += ready - self._now
            self._now = ready

    def _started(self, done: Instruction) -> object:
        """What a ``-done`` waits for. What was sent is not waited for: what comes back is."""
        found = self._computation.by_name[done.operands[0]]
        while found.opcode.endswith("-update"):
            found = self._computation.by_name[found.operands[0]]
        return _rendezvous(found) if found.opcode == "recv" else found.name

    def _operands(self, instruction: Instruction) -> list[Instruction]:
        return [self._computation.by_name[name] for name in instruction.operands if name in self._computation.by_name]

    def _called(self, instruction: Instruction) -> list[Computation]:
        return [self._program.computations[name] for name in instruction.called()]


def _rendezvous(instruction: Instruction) -> str:
    return f"rendezvous {instruction.attribute('_xla_host_transfer_rendezvous')}"


def _fused_collectives(program: Program, computation: Computation) -> dict[tuple[str, str], list[str]]:
    """The fusions that make a collective together, one after another, by its kind and channel."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fusion in computation.instructions:
        if fusion.opcode == "fusion":
            for inner in program.nested(fusion):
                if inner.opcode in COLLECTIVES:
                    found[_key(inner, fusion)].append(fusion.name)
    return found


def _key(inner: Instruction, fusion: Instruction) -> tuple[str, str]:
    # An all-reduce of which each chip keeps its part alone.
    scatters = inner.opcode == "all-reduce" and "all-reduce-scatter" in (fusion.attribute("calls") or "")
    return "reduce-scatter" if scatters else inner.opcode, inner.attribute("channel_id") or fusion.name


def _is_collective(inner: Instruction, fusion: Instruction, key: tuple[str, str]) -> bool:
    return inner.opcode in COLLECTIVES and _key(inner, fusion) == key
