"""Collectives and matrix products of a compiled program, counted in its HLO.

What XLA compiled is the truth about what a step sends between devices: what
was asked for may have been combined, moved out of a loop or doubled. Loops
count as often as XLA says that they run.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "token": 0}


class Array(NamedTuple):
    """Element type in HLO's words, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of it; of less than one byte an element, rounded up."""
        bits = re.search(r"\d+", self.dtype)
        size = _BYTES.get(self.dtype, int(bits[0]) / 8 if bits else 4)
        return math.ceil(math.prod(self.shape) * size)


class Collective(NamedTuple):
    """One collective of a program, on one device.

    Attributes:
      op: one of COLLECTIVES.
      arrays: what a device puts in.
      groups: devices that take part together, by position in the mesh.
      trips: how often it runs; 1 outside loops.
      counted: whether that is known: a loop without a known number of trips
        counts once.
      name: what JAX calls it, to find it in the source.
    """

    op: str
    arrays: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...]
    trips: int
    counted: bool
    name: str

    @property
    def size(self) -> int:
        """Devices of a group."""
        return len(self.groups[0])

    @property
    def bytes(self) -> int:
        """Bytes of the whole array, once: what a device has in or out."""
        own = sum(array.bytes for array in self.arrays)
        return own * self.size if self.op == "all-gather" else own

    @property
    def largest(self) -> int:
        """Elements of the largest array that a device gets."""
        sizes = [math.prod(array.shape) for array in self.arrays]
        # An all-to-all of several arrays gives the pieces of one.
        most = sum(sizes) if self.op == "all-to-all" else max(sizes)
        if self.op == "all-gather":
            return most * self.size
        return most // self.size if self.op == "reduce-scatter" else most

    def axis(self, mesh: Mapping[str, int]) -> str:
        """Mesh axes it goes over, joined by '+'; '' if it goes nowhere.

        Args:
          mesh: size of every axis, the slowest first.

        Raises:
          ValueError: the groups are no axes of this mesh.
        """
        if self.size == 1:
            return ""
        wide = [name for name, n in mesh.items() if n > 1]
        for n_axes in range(1, len(wide) + 1):
            for axes in itertools.combinations(wide, n_axes):
                expected = {frozenset(g) for g in axis_groups(mesh, axes)}
                if {frozenset(g) for g in self.groups} == expected:
                    return "+".join(axes)
        raise ValueError(f"{self.groups} are no axes of {dict(mesh)}")


class Dot(NamedTuple):
    """One matrix product of a program, on one device.

    Attributes:
      left: left operand.
      right: right operand.
      result: what it writes.
      flop: 2 x entries of the result x terms of each, once.
      trips: as a Collective's.
      counted: as a Collective's.
      name: what JAX calls it.
    """

    left: Array
    right: Array
    result: Array
    flop: int
    trips: int
    counted: bool
    name: str


class Program(NamedTuple):
    """What was counted.

    Attributes:
      collectives: all of them.
      dots: all matrix products.
      opaque: targets of custom calls that may be matrix products that were
        not counted.
    """

    collectives: tuple[Collective, ...]
    dots: tuple[Dot, ...]
    opaque: tuple[str, ...]

    @property
    def flop(self) -> int:
        """FLOP of the matrix products, loops unrolled."""
        return sum(dot.flop * dot.trips for dot in self.dots)


def axis_groups(
    mesh: Mapping[str, int], axes: tuple[str, ...]
) -> list[tuple[int, ...]]:
    """Positions of devices that differ along some axes only."""
    groups: dict[tuple[int, ...], list[int]] = {}
    places = itertools.product(*(range(n) for n in mesh.values()))
    for position, place in enumerate(places):
        rest = tuple(
            at for name, at in zip(mesh, place, strict=True) if name not in axes
        )
        groups.setdefault(rest, []).append(position)
    return [tuple(group) for group in groups.values()]


class _Instruction(NamedTuple):
    name: str
    results: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str


def count(text: str) -> Program:
    """Counts in the text of a compiled module (`compiled.as_text()`)."""
    partitions = re.search(r"num_partitions=(\d+)", text)
    n_devices = int(partitions[1]) if partitions else 1
    computations, entry = _computations(text)
    collectives: list[Collective] = []
    dots: list[Dot] = []
    opaque: list[str] = []

    def walk(name: str, trips: int, counted: bool) -> None:
        instructions = computations[name]
        arrays = {i.name: i.results for i in instructions}
        for i in instructions:
            jax_name = _find(r'op_name="([^"]*)"', i.attributes) or i.name
            operands = tuple(
                itertools.chain.from_iterable(
                    arrays.get(operand, ()) for operand in i.operands
                )
            )
            op = i.op.removesuffix("-start")
            if op in COLLECTIVES:
                groups = _groups(i.attributes, n_devices)
                collectives.append(
                    Collective(op, operands, groups, trips, counted, jax_name)
                )
                continue  # what it calls adds two scalars
            if op == "dot":
                left, right = operands
                flop = _dot_flop(i, left)
                dots.append(
                    Dot(
                        left,
                        right,
                        i.results[0],
                        flop,
                        trips,
                        counted,
                        jax_name,
                    )
                )
            elif op in ("custom-call", "convolution"):
                target = _find(r'custom_call_target="([^"]*)"', i.attributes)
                if re.search("gemm|matmul|dot|conv", target or op, re.I):
                    opaque.append(target or op)
            if op == "while":
                trip = _find(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
                body = _find(r"body=%?([\w.\-]+)", i.attributes)
                assert body is not None
                walk(body, trips * int(trip or 1), counted and bool(trip))
            else:
                for called in _called(i.attributes):
                    walk(called, trips, counted)

    walk(entry, 1, True)
    return Program(tuple(collectives), tuple(dots), tuple(opaque))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = found.setdefault(head[2], [])
            if head[1]:
                entry = head[2]
        elif line == "}":
            current = None
        elif current is not None and " = " in line:
            current.append(_instruction(line))
    if not entry:
        raise ValueError("no ENTRY: this is not the text of an HLO module")
    return found, entry


def _instruction(line: str) -> _Instruction:
    line = re.sub(r"/\*.*?\*/", "", line.strip().removeprefix("ROOT "))
    name, _, rest = line.partition(" = ")
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    results, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    return _Instruction(
        name.lstrip("%"),
        tuple(_arrays(results)),
        rest[:opening],
        tuple(operands),
        rest[closing:],
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there closes."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"unbalanced parentheses: {text}")


def _arrays(text: str) -> Iterator[Array]:
    for dtype, shape in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", text):
        yield Array(dtype, tuple(int(n) for n in shape.split(",") if n))


def _find(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _called(attributes: str) -> list[str]:
    names = re.findall(r"(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)",
                       attributes)  # fmt: skip
    for listed in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
        names += [name.strip().lstrip("%") for name in listed.split(",")]
    return names


def _dot_flop(dot: _Instruction, left: Array) -> int:
    axes = _find(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes) or ""
    terms = math.prod(left.shape[int(a)] for a in axes.split(",") if a)
    return 2 * math.prod(dot.results[0].shape) * terms


def _groups(attributes: str, n_devices: int) -> tuple[tuple[int, ...], ...]:
    """Replica groups, written out or as a reshaped, transposed iota."""
    pairs = _find(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs is not None:
        # Whoever sends around a ring belongs together.
        return _connected(_lists(pairs))
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?",
        attributes,
    )
    if iota:
        import numpy as np

        shape, dims = (tuple(map(int, iota[k].split(","))) for k in (1, 2))
        order = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            order = order.transpose(tuple(map(int, iota[3].split(","))))
        return tuple(map(tuple, order.reshape(shape).tolist()))
    written = _find(r"replica_groups=\{(.*?\})\}", attributes)
    if written:
        return _lists(written)
    return (tuple(range(n_devices)),)


def _lists(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(int(n) for n in group.split(",") if n)
        for group in re.findall(r"\{([\d,]+)", text)
    )


def _connected(
    pairs: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, ...], ...]:
    groups: list[set[int]] = []
    for pair in pairs:
        touching = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if not group & set(pair)]
        groups.append(set(pair).union(*touching))
    return tuple(tuple(sorted(group)) for group in groups)
