"""Reading a JAX trace: how long each part of a compiled program kept its devices busy.

A part is a `jax.named_scope`; XLA hands its name on to every instruction made from it. An
instruction that joins several parts counts for the part of its last operation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

OTHER = "other"
CONTAINER = "container"  # loops and calls
SCOPES = (
    "projection", "recurrence", "gates", "heads", "sampling", "scoring", "policy", "outcome",
    "output",
)  # fmt: skip
PARTS = (*SCOPES, OTHER)

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_CONTAINERS = ("while", "conditional", "call")


class Span(NamedTuple):
    """An instruction in flight on a device, in ns."""

    device: str
    start: float
    end: float
    name: str


def parts_of(hlo: str) -> dict[str, str]:
    """The part that each instruction of a compiled program belongs to.

    Args:
      hlo: the program's text, `compiled.as_text()`.
    """
    inside: dict[str, Counter[str]] = {}  # of each computation, its instructions by part
    found: dict[str, tuple[str | None, str, list[str]]] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            name, opcode = match[1], match[2]
            op_name = _OP_NAME.search(line)
            scope = _scope(op_name[1]) if op_name else None
            found[name] = (scope, opcode, _CALLS.findall(line))
            if scope:
                inside.setdefault(computation, Counter())[scope] += 1
    parts = {}
    for name, (scope, opcode, calls) in found.items():
        for called in calls if scope is None else ():
            if called in inside:
                scope = inside[called].most_common(1)[0][0]
        parts[name] = CONTAINER if opcode in _CONTAINERS else scope or OTHER
    return parts


def _scope(op_name: str) -> str | None:
    """The innermost of our scopes in a path such as jit(f)/while/body/heads/dot_general.

    What runs inside of the outcome model or of a policy is theirs.
    """
    named = [part for part in op_name.split("/") if part in SCOPES]
    whole = [part for part in named if part in ("outcome", "policy")]
    kept = whole or named[-1:]
    return kept[0] if kept else None


def read_spans(folder: Path) -> list[Span]:
    """Spans of compiled instructions in the newest trace under a folder."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    spans = []
    for plane in devices or planes:
        begun: dict[int, tuple[str, float, float, str]] = {}
        ended: dict[int, float] = {}
        for line in plane.lines:
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                stop = event.start_ns + event.duration_ns
                if "hlo_op" in stats:
                    device = f"{plane.name} {stats.get('device_ordinal', 0)}"
                    identity = stats.get("_p", -len(begun) - 1)
                    begun[identity] = (device, event.start_ns, stop, str(stats["hlo_op"]))
                elif "_c" in stats:
                    ended[stats["_c"]] = event.start_ns
        # A product goes on in other threads after the call that began it; its end is an event.
        spans += [
            Span(device, start, max(stop, ended.get(identity, stop)), name)
            for identity, (device, start, stop, name) in begun.items()
        ]
    return spans


def busy_seconds(spans: Iterable[Span], parts: Mapping[str, str]) -> dict[str, float]:
    """Device-seconds by part.

    A device's time is shared evenly by the instructions that it has in flight; loops count for
    what runs in them.

    Args:
      spans: from `read_spans`.
      parts: from `parts_of`.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    by_device: dict[str, list[tuple[float, int, str]]] = {}
    for span in spans:
        part = parts.get(span.name, OTHER)
        if part != CONTAINER:
            edges = by_device.setdefault(span.device, [])
            edges += [(span.start, 1, part), (span.end, -1, part)]
    for edges in by_device.values():
        flying: Counter[str] = Counter()
        before = 0.0
        for moment, change, part in sorted(edges):
            total = flying.total()
            for name, count in flying.items():
                if count:
                    seconds[name] += (moment - before) * 1e-9 * count / total
            flying[part] += change
            before = moment
    return seconds
