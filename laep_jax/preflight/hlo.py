"""What a compiled program does, read from its optimised HLO text: collectives and kernels.

The text gives each operation once; one in the body of a loop runs as often as the loop does. Of a
conditional the branch for "true" counts: `dispatch.bounded_dispatch` puts the usual way there.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BETWEEN_SLICES = "send"  # what goes over the data-center network, once reduced within the slice
CALLS = {"call", "call-start", "async-start"}  # of which the operations that they call count
BOOKKEEPING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", *CALLS}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
TUPLE = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"  # of tuples of arrays, whose layouts have parentheses
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = ({TUPLE}|\S+) ([\w-]+)\((.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
ARRAY = re.compile(r"\b([a-z]\w*?)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation. `result`: its type as text. `rest`: operands and attributes."""

    name: str
    result: str
    opcode: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as body=%x names."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    def branches(self) -> list[str]:
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        names = (
            found[1].split(",")
            if found
            else [self.attribute(f"{side}_computation") or "" for side in ("false", "true")]
        )
        return [name.strip().lstrip("%") for name in names]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind: how often it runs; bytes of results; bytes a chip receives. Of these, what runs beside the rest."""

    count: int = 0
    num_bytes: int = 0
    link_bytes: int = 0
    asynchronous: int = 0
    asynchronous_link_bytes: int = 0


@functools.lru_cache(maxsize=1)
def parse(text: str) -> tuple[str, dict[str, list[Operation]]]:
    """The name of the entry computation, and every computation's operations: not to be changed, the last is kept."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if start := COMPUTATION.match(line):
                current = computations.setdefault(start[1], [])
                entry = start[1] if line.startswith("ENTRY") else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif operation := OPERATION.match(line):
            current.append(Operation(*operation.groups()))
    return entry, computations


def array_bytes(result: str) -> int:
    """Bytes of a type such as `(bf16[4,8]{1,0}, u32[])`; what is no plain array counts nothing.

    >>> array_bytes("(bf16[4,8]{1,0:T(8,128)(2,1)}, u32[])")
    68
    """
    total = 0
    for dtype, dims in ARRAY.findall(result):
        size = BYTES.get(dtype, 0)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def trip_count(condition: list[Operation]) -> int:
    """How often a counted loop runs: the constant its counter is compared with; 1 where none is seen."""
    constants = {
        op.name: int(value[1])
        for op in condition
        if op.opcode == "constant" and (value := re.match(r"(\d+)\)", op.rest))
    }
    return max(constants.values(), default=1) or 1


def executed(text: str) -> Iterator[tuple[Operation, int, bool]]:
    """Every operation, how often it runs in one execution (0 in branches not taken), whether beside the others."""
    entry, computations = parse(text)

    def visit(name: str, times: int, beside: bool) -> Iterator[tuple[Operation, int, bool]]:
        for op in computations.get(name, ()):
            starts = op.opcode.endswith("-start")
            yield op, times, beside or starts
            if op.opcode == "while":
                body, condition = op.attribute("body") or "", op.attribute("condition") or ""
                yield from visit(body, times * trip_count(computations.get(condition, [])), beside)
            elif op.opcode == "conditional":
                *others, taken = op.branches()
                yield from visit(taken, times, beside)
                for other in others:
                    yield from visit(other, 0, beside)
            elif op.opcode in CALLS:
                yield from visit(op.attribute("to_apply") or op.attribute("calls") or "", times, beside or starts)

    return visit(entry, 1, False)


def collectives(text: str) -> dict[str, Collective]:
    """Transfers between chips in one execution, by kind.

    Two of XLA:TPU's forms are fusions: a reduce-scatter is an all-reduce with the choice of a part, and what runs in
    pieces beside products is whole in each of the fusions that it passes, the first of which counts.
    """
    found: dict[str, Collective] = {}
    _, computations = parse(text)
    for op, times, beside in executed(text):
        kind, result, groups = op.opcode.removesuffix("-start"), op.result, op.rest
        called = (op.attribute("calls") or "") if op.opcode == "fusion" else ""
        if called.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
            groups = next(inner.rest for inner in computations[called] if inner.opcode == "all-reduce")
        elif called and op.name.startswith("async-collective-start"):
            inner = next(inner for inner in computations[called] if inner.opcode in COLLECTIVES)
            kind, result, groups, beside = inner.opcode, inner.result, inner.rest, True
        if kind in (*COLLECTIVES, BETWEEN_SLICES) and times:
            size = times * array_bytes(result)
            if op.opcode in ("all-gather-start", "collective-permute-start"):  # operands, results, and counters
                arrays = [f"{dtype}[{dims}]" for dtype, dims in ARRAY.findall(result) if dims]
                size = times * sum(map(array_bytes, arrays[len(arrays) // 2 :]))
            received = int(size * _received(kind, group_size(groups)))
            new = times, size, received, times * beside, received * beside
            old = dataclasses.astuple(found.get(kind, Collective()))
            found[kind] = Collective(*map(operator.add, old, new))
    return found


def num_operations(text: str) -> int:
    """Operations that the device is given one by one in one execution: fusions, kernels, collectives and the like."""
    return sum(
        times for op, times, _ in executed(text) if op.opcode not in BOOKKEEPING and not op.opcode.endswith("-done")
    )


def _received(kind: str, chips: int) -> float:
    """Bytes that a chip of a group must receive at least, in units of its result."""
    others = (chips - 1) / chips
    if kind == "collective-permute":
        return 1.0
    return {"all-gather": others, "all-reduce": 2 * others, "reduce-scatter": chips - 1.0}.get(kind, others)


def group_size(rest: str) -> int:
    """Chips in one replica group, in any of the three notations; 1 where there is none.

    >>> group_size("replica_groups={{0,8},{1,9}}, x=1"), group_size("replica_groups=[4,8]<=[32]")
    (2, 8)
    >>> group_size("replica_groups=mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'b'}")
    8
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1


def kernels(text: str) -> dict[str, int]:
    """How often each kernel stands in the program, branches not taken included."""
    found: dict[str, int] = {}
    for op, _, _ in executed(text):
        name = None
        if op.opcode == "ragged-all-to-all":
            name = op.opcode
        elif op.opcode == "custom-call" and "tpu_custom_call" in op.rest:
            name = "splash attention" if "splash" in op.name + op.rest else re.sub(r"[.\d]+$", "", op.name)
        if name:
            found[name] = found.get(name, 0) + 1
    return found
