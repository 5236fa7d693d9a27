"""Reads the HLO text that XLA has compiled for a GPU: its kernels, one by one.

Nothing here loads JAX. Bytes are those that a kernel has to move: all of an
operand, except of arrays that it gathers from, slices, or updates in place. A
gather reads what it returns, and an update in place reads and writes the
updated entries.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0}  # others have their number of bits in the name
# No kernel: names of existing memory, and ends of asynchronous operations.
_FREE = re.compile(
    "parameter$|get-tuple-element$|tuple$|bitcast$|constant$|after-all$"
    "|partition-id$|replica-id$|opt-barrier$|.*-done$"
)
COLLECTIVE = re.compile("all-reduce|all-gather|reduce-scatter|all-to-all|coll")
_IN_PLACE = ("dynamic-update-slice", "scatter")


class Instruction(NamedTuple):
    """An instruction of HLO."""

    name: str
    shape: str  # such as 'f32[8,600]{1,0}', or several in parentheses
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes and metadata


class Kernel(NamedTuple):
    """What an instruction of the schedule does each time that it runs."""

    name: str
    op: str  # the operation, or the target of a custom call
    source: str  # the operation of the traced program
    read: tuple[int, ...]  # bytes of each operand
    gathered: int  # bytes of gathered entries, as often as they are read
    written: tuple[int, ...]  # bytes of each result
    flop: int  # of matrix products
    operand: str  # dtype of the products' operands; '' without a product
    times: int  # runs in each run of the program; 0 if XLA does not know


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """Returns the dtype and the dimensions of each array in a shape."""
    return [
        (dtype, [int(n) for n in numbers.split(",") if n])
        for dtype, numbers in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]


def sizes(shape: str) -> list[int]:
    """Returns the bytes of each array in a shape."""

    def size(dtype: str, dimensions: list[int]) -> int:
        named = re.search(r"[a-z](\d+)", dtype)
        bits = _BITS.get(dtype, int(named[1]) if named else 0)
        return bits * math.prod(dimensions) // 8

    return [size(*array) for array in arrays(shape)]


class Module:
    """The computations of a compiled module."""

    def __init__(self, text: str) -> None:
        """Parses `jax.stages.Compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(("HloModule", " ")):
                name = "" if head[1] else head[2]
                current = self.computations.setdefault(name, [])
            found = re.match(
                r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)",
                line,
            )
            if found:
                name, shape, op, rest = found.groups()
                inside, _, rest = rest.partition(")")
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                if op == "parameter":
                    operands = (inside,)
                current.append(Instruction(name, shape, op, operands, rest))

    def step(self) -> tuple[list[Kernel], list[Kernel]]:
        """Returns the kernels of the outermost loop, and those around it.

        Without a loop, all kernels are those of the step.
        """
        around = list(self.kernels("", loops=False))
        bodies = [
            _called(i, "body")[0]
            for i in self.computations[""]
            if i.op == "while"
        ]
        if not bodies:
            return around, []
        body = max(bodies, key=lambda name: len(self.computations[name]))
        return list(self.kernels(body)), around

    def kernels(
        self, computation: str, times: int = 1, loops: bool = True
    ) -> Iterator[Kernel]:
        """Yields the kernels of a computation in the order of the schedule."""
        shapes = {i.name: i.shape for i in self.computations[computation]}
        for i in self.computations[computation]:
            if i.op in ("while", "call", "conditional"):
                if i.op == "while" and not loops:
                    continue
                inner = times
                if i.op == "while":
                    known = re.search(
                        r'known_trip_count":\{"n":"(\d+)"', i.rest
                    )
                    inner = times * int(known[1]) if known else 0
                keys = "body|to_apply|branch_computations"
                for name in _called(i, keys):
                    yield from self.kernels(name, inner)
            elif not _FREE.match(i.op):
                yield self._kernel(i, shapes, times)

    @functools.cached_property
    def beside(self) -> dict[str, list[str]]:
        """The kernels between start and end of each collective.

        A collective without any runs alone. XLA writes the instructions of a
        GPU in the order in which it starts them.
        """
        found = {}
        for body in self.computations.values():
            for start, i in enumerate(body):
                if COLLECTIVE.match(i.op) and i.op.endswith("-start"):
                    after = body[start + 1 :]
                    end = [i.name in x.operands for x in after].index(True)
                    found[i.name] = [
                        x.name for x in after[:end] if not _FREE.match(x.op)
                    ]
        return found

    def _kernel(
        self, i: Instruction, shapes: dict[str, str], times: int
    ) -> Kernel:
        target = re.search(r'custom_call_target="([^"]*)"', i.rest)
        source = re.search(r'op_name="([^"]*)"', i.rest)
        read = [sum(sizes(shapes[o])) for o in i.operands]
        written = sizes(i.shape)
        called, gathered = _called(i, "calls"), 0
        if i.op == "fusion":
            body = self.computations[called[0]]
            read = _read(body)
            taken = [sum(sizes(x.shape)) for x in body if x.op == "gather"]
            gathered = sum(taken)
            written = _written(body, body[-1])
        flop, operand = self._products(i, shapes)
        return Kernel(
            i.name,
            target[1] if target else i.op,
            source[1] if source else "",
            tuple(n for n in read if n),
            gathered,
            tuple(n for n in written if n),
            flop,
            operand,
            times,
        )

    def _products(
        self, i: Instruction, shapes: dict[str, str]
    ) -> tuple[int, str]:
        """Returns (FLOP, dtype of the operands) of an instruction's products.

        cuBLAS is called with the numbers of the dimensions in JSON.
        """
        summed = re.search(
            r'lhs_contracting_dim(?:s=\{|ensions":\[")([\d",]+)', i.rest
        )
        flop, operand = 0, ""
        if summed and i.operands:
            [(operand, left), *_] = arrays(shapes[i.operands[0]])
            terms = [left[int(n)] for n in re.findall(r"\d+", summed[1])]
            flop = 2 * math.prod(arrays(i.shape)[0][1] + terms)
        for name in _called(i, "calls"):
            body = self.computations[name]
            inner = {i.name: i.shape for i in body}
            for instruction in body:
                more, dtype = self._products(instruction, inner)
                flop, operand = flop + more, dtype or operand
        return flop, operand


def _read(body: list[Instruction]) -> list[int]:
    """Returns the bytes that a fusion reads of each of its operands."""
    shapes = {i.name: i.shape for i in body}
    users: dict[str, list[Instruction]] = {i.name: [] for i in body}
    for i in body:
        for name in set(i.operands) & set(users):
            users[name].append(i)

    @functools.cache
    def entries(name: str, inside: bool = True) -> int:
        """Returns how many entries of an array are used.

        `inside` says that the array is an operand, which can be updated.
        """
        [(_, dimensions), *_] = arrays(shapes[name]) or [("", [0])]
        everything, used = math.prod(dimensions), 0
        for user in users[name]:
            first = user.operands[0] == name
            if first and user.op in ("gather", "dynamic-slice", "slice"):
                used += math.prod(arrays(user.shape)[0][1])
            elif first and user.op in _IN_PLACE and inside:
                used += _updates(user, shapes)[1]
            elif user.op == "bitcast":
                used += entries(user.name, inside)
            elif [x for _, x in arrays(user.shape)] == [dimensions]:
                used += entries(user.name, False)  # entry by entry
            else:
                return everything
        return min(used, everything) if users[name] else everything

    read = []
    for i in body:
        if i.op == "parameter":
            [(_, dimensions), *_] = arrays(i.shape) or [("", [0])]
            share = entries(i.name) / (math.prod(dimensions) or 1)
            read.append(round(share * sum(sizes(i.shape))))
    return read


def _written(body: list[Instruction], i: Instruction) -> list[int]:
    """Returns the bytes that a fusion writes of each of its results."""
    by_name = {i.name: i for i in body}
    if i.op == "tuple":
        return [n for o in i.operands for n in _written(body, by_name[o])]
    if i.op == "bitcast" and i.operands[0] in by_name:
        return _written(body, by_name[i.operands[0]])
    if i.op in _IN_PLACE:
        target = by_name[i.operands[0]]
        while target.op == "bitcast":
            target = by_name[target.operands[0]]
        if target.op == "parameter":
            return [_updates(i, {i.name: i.shape for i in body})[0]]
    return sizes(i.shape)


def _updates(i: Instruction, shapes: dict[str, str]) -> tuple[int, int]:
    """Returns (bytes, entries) that an instruction puts into an array."""
    last = i.operands[1] if i.op == "dynamic-update-slice" else i.operands[-1]
    return sum(sizes(shapes[last])), math.prod(arrays(shapes[last])[0][1])


def _called(i: Instruction, keys: str) -> list[str]:
    found = re.findall(rf"(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", i.rest)
    return [name for text in found for name in re.findall(r"[\w.\-]+", text)]
