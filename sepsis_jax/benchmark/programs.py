"""What a compiled program does on an accelerator: kernels, bytes that they move, operations.

Read from XLA's optimised HLO, so that a device need not be there. Bodies of loops count as often as
they run, which the compilers' own counts leave out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SIZES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
         "partition-id", "replica-id", "opt-barrier", "copy-done", "async-done"}  # fmt: skip
_WRITTEN = {"dynamic-update-slice": 1, "scatter": 2}  # in place, and the operand that is written
_SLICES = ("dynamic-slice", "gather", "slice")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
# FLOPs of a Pallas kernel: a TPU's estimate, or a GPU's metadata, whose quotes are written \22.
_ESTIMATE = re.compile(
    r'(?:"cost_estimate":\{"flops":"|serialized_metadata = "\{\\22flops\\22: \\22)(\d+)'
)
_ON_CHIP = "S(1)"  # a TPU's own memory, which is not HBM


@dataclass(frozen=True)
class Instruction:
    """A line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def size(self) -> int:
        """Bytes of its result."""
        return _bytes_of(self.type, on_chip=True)

    @property
    def bytes(self) -> int:
        """Of its result, without what lies in a TPU's on-chip memory."""
        return _bytes_of(self.type, on_chip=False)

    def called(self, key: str) -> str:
        """Name of the computation under a key such as `body`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""


def _bytes_of(text: str, *, on_chip: bool) -> int:
    return sum(
        _SIZES.get(kind, 0) * math.prod(_shape(shape))
        for kind, shape, layout in _ARRAY.findall(text)
        if on_chip or _ON_CHIP not in layout
    )


@dataclass
class Traffic:
    """Of one call of a program; all are counted, nothing is measured.

    Attributes:
      kernels: launches.
      bytes: read and written in the device's memory: operands and results of every kernel, of
        which slices are read or written as far as they are. Caches are not thought of.
      flops: of matrix products; of a Pallas kernel what it says of itself, as its inside is no HLO.
      by_opcode: bytes by kind of kernel.
    """

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    by_opcode: dict[str, int] = field(default_factory=dict)

    def add(self, other: Traffic, times: int) -> None:
        """Adds another, so many times."""
        self.kernels += times * other.kernels
        self.bytes += times * other.bytes
        self.flops += times * other.flops
        for name, count in other.by_opcode.items():
            self.by_opcode[name] = self.by_opcode.get(name, 0) + times * count


def traffic(hlo: str) -> Traffic:
    """Counts a program.

    Args:
      hlo: text of an optimised module (`compiled.as_text()`).

    Raises:
      ValueError: it has no entry.
    """
    computations, entry = parse(hlo)
    if entry is None:
        raise ValueError("HLO: has no ENTRY computation; give `compiled.as_text()`")
    return _of(computations[entry], computations)


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """Computations by name, and the name of the one that begins."""
    found: dict[str, list[Instruction]] = {}
    entry = None
    current: list[Instruction] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head and not line.startswith(" "):
            current = found.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif " = " in line and line.startswith(" "):
            current.append(_instruction(line))
    return found, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    close = _closing(rest, start)
    inside = rest[start + 1 : close]
    literal = opcode in ("parameter", "constant")
    operands = (inside,) if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name.lstrip("%"), rest[:end], opcode, operands, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"HLO: unbalanced parentheses in {text[:80]!r}")


def _shape(text: str) -> Sequence[int]:
    return [int(size) for size in text.split(",") if size]


def _of(body: Sequence[Instruction], all_: Mapping[str, Sequence[Instruction]]) -> Traffic:
    found = Traffic()
    named = {one.name: one for one in body}
    for one in body:
        if one.opcode in _FREE:
            continue
        if one.opcode == "while":
            found.add(_of(all_[one.called("body")], all_), _trips(one, all_))
            continue
        if one.opcode == "call":
            found.add(_of(all_[one.called("to_apply")], all_), 1)
            continue
        if one.opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", one.attributes.split("metadata")[0])
            branches = [_of(all_[name], all_) for name in names if name in all_]
            found.add(max(branches, key=lambda branch: branch.bytes, default=Traffic()), 1)
            continue
        moved, flops = _kernel(one, named, all_)
        if moved or flops:
            found.add(Traffic(1, moved, flops, {one.opcode: moved}), 1)
    return found


def _trips(loop: Instruction, all_: Mapping[str, Sequence[Instruction]]) -> int:
    """How often a loop runs: as XLA says, or up to the bound of its condition; 1 if unknown."""
    known = re.search(r'known_trip_count\D*"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    bounds = [
        int(one.operands[0])
        for one in all_.get(loop.called("condition"), ())
        if one.opcode == "constant" and one.type.startswith("s32[]")
    ]
    return max(bounds, default=1)


def _kernel(
    one: Instruction,
    named: Mapping[str, Instruction],
    all_: Mapping[str, Sequence[Instruction]],
) -> tuple[int, int]:
    """Bytes and FLOPs of one kernel."""
    inner = all_.get(one.called("calls"), ()) if one.opcode in ("fusion", "async-start") else ()
    if not inner:
        if one.opcode in _WRITTEN:
            part = named[one.operands[_WRITTEN[one.opcode]]]
            return part.bytes + (part.size if one.bytes else 0), 0
        read = sum(named[name].bytes for name in one.operands if name in named)
        if one.opcode in _SLICES:
            read = min(one.size, read)
        return read + one.bytes, _flops(one, named)
    inside = {step.name: step for step in inner}
    users: dict[str, list[Instruction]] = {}
    for step in inner:
        for name in step.operands:
            users.setdefault(name, []).append(step)
    read = 0
    for number, name in enumerate(one.operands):
        parameter = next(
            (step for step in inner if step.opcode == "parameter" and _number(step) == number), None
        )
        if parameter is None or name not in named:
            continue
        read += min(named[name].bytes, _read(parameter, users))
    written = one.bytes
    root = inner[-1]
    if root.opcode in _WRITTEN:
        written = min(inside[root.operands[_WRITTEN[root.opcode]]].size, written)
    return read + written, sum(_flops(step, inside) for step in inner) + sum(
        _kernel(step, inside, all_)[1] for step in inner if step.opcode == "fusion"
    )


def _number(parameter: Instruction) -> int:
    return int(parameter.operands[0])


def _read(parameter: Instruction, users: Mapping[str, Sequence[Instruction]]) -> int:
    """Bytes of a fusion's parameter that are read: all, or slices where only those are."""
    of_it = users.get(parameter.name, ())
    if not of_it:
        return 0
    total = 0
    for user in of_it:
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += user.size
        elif user.opcode in _WRITTEN and user.operands[0] == parameter.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(user, users)
        else:
            return parameter.size
    return total


def _flops(one: Instruction, named: Mapping[str, Instruction]) -> int:
    """Operations of a product: two per multiplication and addition.

    Products are XLA's own, cuBLAS's, the convolutions that they become on TPUs, or those of a
    Pallas kernel with a cost estimate.
    """
    if one.opcode == "custom-call" and (own := _ESTIMATE.search(one.attributes)):
        return int(own.group(1))
    if one.opcode == "dot":
        pattern = r"lhs_contracting_dims=\{([\d,]*)\}"
    elif one.opcode == "custom-call" and "cublas" in one.attributes:
        pattern = r'"lhs_contracting_dimensions":\["([\d",]*)"\]'
    elif one.opcode == "convolution":
        return 2 * _elements(one.type) * _contracted_by_convolution(one, named)
    else:
        return 0
    contracted = re.search(pattern, one.attributes)
    left = named.get(one.operands[0])
    if contracted is None or left is None:
        return 0
    shape = _array(left.type)
    axes = _shape(contracted.group(1).replace('"', ""))
    return 2 * math.prod(shape[axis] for axis in axes) * _elements(one.type)


def _contracted_by_convolution(one: Instruction, named: Mapping[str, Instruction]) -> int:
    labels = re.search(r"dim_labels=\w+_(\w+)->", one.attributes)
    right = named.get(one.operands[1])
    if labels is None or right is None:
        return 0
    shape = _array(right.type)
    return math.prod(shape) // shape[labels.group(1).index("o")]


def _array(text: str) -> Sequence[int]:
    """Shape of the first array of a type."""
    (_, shape, _), *_ = _ARRAY.findall(text)
    return _shape(shape)


def _elements(text: str) -> int:
    return math.prod(_array(text))
