"""What a compiled step moves, read off its optimised HLO: bytes through HBM, and collectives by kind.

All figures are one device's, for one step. Loops count as often as they run: XLA notes it (`known_trip_count`), or else the
loop's counter says it: from what it starts, in what steps, to what limit. Of a conditional the branch that moves most counts.

HBM bytes: every instruction reads its operands and writes its result once, as far as these lie in HBM (the compiler marks
what stays in a chip's own memory). What happens inside a fusion moves nothing. A slice is as large as itself, not as the array
that it is cut from; an update in place is as large as the update. So this is the traffic of the program as compiled, not a
bound that a better program would meet.

Collective bytes: what one device must send over its links, by the best algorithm, in a group of g: a share (g - 1) / g of the
gathered array in an all-gather, of the array to be reduced in a reduce-scatter, of the whole in an all-to-all; twice that in
an all-reduce; all of it in a permute. A chain of asynchronous pieces is one collective (by its channel). Of a group that spans
slices, the part that has to cross between them is counted apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.plan.hlo_text import ARRAY, Instruction, array_bytes, attribute, branches, elements, groups, parse

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "add-dependency", "domain", "get-dimension-size",
}  # fmt: skip
_PIECES = "channel "  # keys of collectives inside fusions: what shares a channel there is one, in pieces
_CUTS = {"dynamic-slice", "slice", "gather"}


class Collective(NamedTuple):
    """Of one kind: how many a step runs, and the bytes that a device sends, inside a slice and between slices."""

    times: float
    bytes: float
    dcn_bytes: float


class Traffic(NamedTuple):
    """`saved_bytes` are the arrays that the forward pass's loops pile up for the backward pass, `gradient_bytes` those that the
    backward pass's loops pile up; `dot_flops` multiplications of the program as compiled (where the compiler keeps them as such),
    `dot_bytes` the part of `hbm_bytes` that these move."""

    hbm_bytes: float
    collectives: dict[str, Collective]
    saved_bytes: int
    gradient_bytes: int
    dot_flops: float
    dot_bytes: float


class _Sum(NamedTuple):
    """`dots` are the bytes of `hbm` that instructions with a multiplication move."""

    hbm: float
    dots: float
    flops: float
    channels: dict[str, tuple[str, float, float, float]]  # channel -> (kind, times, bytes, bytes between slices)


def traffic(text: str, slices: Sequence[int] = ()) -> Traffic:
    """Reads `compiled.as_text()`; `slices` says for each device of the mesh, in order, which slice it is in."""
    program = _Program(text, np.asarray(slices, np.int64))
    found = program.total(program.entry)
    kinds: dict[str, Collective] = {}
    for kind, times, sent, crossing in found.channels.values():
        had = kinds.get(kind, Collective(0, 0, 0))
        kinds[kind] = Collective(had.times + times, had.bytes + times * sent, had.dcn_bytes + times * crossing)
    saved, gradients = program.piled()
    return Traffic(found.hbm, dict(sorted(kinds.items())), saved, gradients, found.flops, found.dots)


class _Program:
    def __init__(self, text: str, slices: np.ndarray):
        self.computations, self.entry = parse(text)
        self.by_name = {name: {i.name: i for i in body} for name, body in self.computations.items()}
        self.fused = {
            attribute(i, "calls") for body in self.computations.values() for i in body if i.opcode == "fusion"
        }
        self.slices = slices
        self.done: dict[str, _Sum] = {}

    def total(self, name: str) -> _Sum:
        """What running a computation once moves, everything that it calls included."""
        if name not in self.done:
            hbm = dots = flops = 0.0
            channels: dict[str, tuple[str, float, float, float]] = {}
            for instruction in self.computations.get(name, ()):
                more = self._one(name, instruction)
                hbm, dots, flops = hbm + more.hbm, dots + more.dots, flops + more.flops
                for channel, found in more.channels.items():
                    had = channels.get(channel, (found[0], 0.0, 0.0, 0.0))[1]
                    times = max(had, found[1]) if channel.startswith(_PIECES) else had + found[1]
                    channels[channel] = (found[0], times, *found[2:])
            self.done[name] = _Sum(hbm, dots, flops, channels)
        return self.done[name]

    def _one(self, where: str, instruction: Instruction) -> _Sum:
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return _Sum(0, 0, 0, {})
        if kind in KINDS:
            return self._collective(where, instruction, kind)
        if opcode == "send" and "xla_megascale_runtime" in instruction.rest:  # a collective's part between slices
            crossing = float(array_bytes(self._type(where, instruction.operands[0])))
            return _Sum(crossing, 0, 0, {f"{where}/{instruction.name}": ("send", 1.0, 0.0, crossing)})
        if opcode == "while":
            body, times = self.total(attribute(instruction, "body")), self.trips(where, instruction)
            channels = {c: (k, n * times, b, d) for c, (k, n, b, d) in body.channels.items()}
            return _Sum(body.hbm * times, body.dots * times, body.flops * times, channels)
        if opcode == "conditional":
            return max((self.total(branch) for branch in branches(instruction)), key=lambda s: (s.hbm, s.flops))
        called = re.search(r"called_computations=\{%?([\w.\-]+)", instruction.rest)  # what a SparseCore does
        if kind in ("call", "async") or called:
            inner = called.group(1) if called else attribute(instruction, "to_apply") or attribute(instruction, "calls")
            return self.total(inner)
        if opcode == "fusion":
            inside = self.total(attribute(instruction, "calls"))
            sent = sum(c[2] for c in inside.channels.values())
            moved = self._fusion(where, instruction) + (self._gathered(instruction) if sent else 0)
            return _Sum(moved, moved if inside.flops else 0.0, inside.flops, inside.channels)
        flops = self._dot(where, instruction) if opcode == "dot" else 0.0
        moved = self._plain(where, instruction)
        return _Sum(moved, moved if flops else 0.0, flops, {})

    def _plain(self, where: str, instruction: Instruction) -> float:
        """Operands read and result written, by one instruction on its own."""
        opcode, result = instruction.opcode, array_bytes(instruction.type, True)
        if opcode.endswith("-start"):  # (source, result, …) of a copy, ((source), result, …) of a slice
            arrays = [m.group(0) for m in ARRAY.finditer(instruction.type)][:2]
            size = min((array_bytes(array) for array in arrays), default=0)
            return float(sum(size for array in arrays if array_bytes(array, True)))
        if opcode in _CUTS:
            return 2.0 * result
        if opcode == "dynamic-update-slice":
            return 2.0 * array_bytes(self._type(where, instruction.operands[1]), True)
        return result + sum(array_bytes(self._type(where, name), True) for name in instruction.operands)

    def _fusion(self, where: str, instruction: Instruction) -> float:
        """Operands, as far as the fusion reads them, and results that it makes."""
        body = self.computations.get(attribute(instruction, "calls"), [])
        inside = {i.name: i for i in body}
        users: dict[str, list[Instruction]] = {}
        for each in body:
            for operand in each.operands:
                users.setdefault(operand, []).append(each)
        total = 0.0
        for each in body:
            if each.opcode == "parameter":
                number = int(each.operands[0])
                given = self._type(where, instruction.operands[number]) if number < len(instruction.operands) else ""
                total += self._read(each, given, users, inside)
        root = body[-1] if body else None
        made = [inside[name] for name in root.operands if name in inside] if root and root.opcode == "tuple" else [root]
        return total + sum(self._written(each, inside, instruction, root) for each in made if each is not None)

    def _read(self, parameter: Instruction, given: str, users: dict[str, list[Instruction]], inside: Any) -> float:
        whole = array_bytes(given, True)
        uses = [
            u
            for u in _through(parameter.name, users)
            if u.opcode != "tuple" and u.opcode.removesuffix("-start") not in KINDS
        ]
        if not whole or not uses:
            return 0.0
        parts = 0.0
        for use, name in ((u, n) for u in uses for n in u.operands[:1]):
            alias = _source(name, inside) == parameter.name
            if use.opcode in _CUTS and alias:
                parts += array_bytes(use.type)
            elif use.opcode == "dynamic-update-slice" and alias:
                parts += 0.0
            else:
                return float(whole)
        return min(parts, float(whole))

    def _written(self, made: Instruction, inside: Any, fusion: Instruction, root: Instruction | None) -> float:
        name = _source(made.name, inside)
        origin = inside.get(name, made)
        if origin.opcode == "parameter" or origin.opcode.removesuffix("-start") in KINDS:
            return 0.0
        if origin.opcode == "dynamic-update-slice" and len(origin.operands) > 1 and origin.operands[1] in inside:
            return float(array_bytes(inside[origin.operands[1]].type))
        return float(array_bytes(fusion.type if made is root else made.type, True))

    def _gathered(self, fusion: Instruction) -> float:
        """What the collectives inside a fusion write to HBM, once a chain: the piece that starts it says `Start`."""
        body = self.computations.get(attribute(fusion, "calls"), [])
        starts = any("AsyncCollectiveStart" in each.rest for each in body)
        return float(sum(array_bytes(e.type, True) for e in body if e.opcode in KINDS)) if starts else 0.0

    def _dot(self, where: str, instruction: Instruction) -> float:
        lhs = ARRAY.search(self._type(where, instruction.operands[0]))
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        out = ARRAY.search(instruction.type)
        if not (lhs and dims and out):
            return 0.0
        sizes = [int(size) for size in lhs.group(2).split(",") if size]
        return 2.0 * elements(out.group(2)) * math.prod(sizes[int(d)] for d in dims.group(1).split(",") if d)

    def _type(self, where: str, name: str) -> str:
        found = self.by_name[where].get(name)
        return found.type if found else ""

    # ---- collectives ----

    def _collective(self, where: str, instruction: Instruction, kind: str) -> _Sum:
        arrays = [m.group(0) for m in ARRAY.finditer(instruction.type)]
        read = sum(array_bytes(self._type(where, name)) for name in instruction.operands)
        in_hbm = sum(array_bytes(self._type(where, name), True) for name in instruction.operands)
        if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, …)
            arrays = [array for array in arrays if "S(2)" not in array]
            arrays = arrays[len(arrays) // 2 :]
        whole = max(sum(array_bytes(array) for array in arrays), read)
        members = groups(instruction, kind, len(self.slices))
        size = members.shape[1]
        spans = 1
        if len(self.slices) > int(members.max(initial=0)):
            spans = max(len(set(self.slices[group].tolist())) for group in members)
        share = 1.0 if kind == "collective-permute" else (size - 1) / size
        sent = whole * share * (2 if kind == "all-reduce" else 1)
        crossing = 0.0
        if spans > 1:
            between = 1.0 if kind == "collective-permute" else (spans - 1) / spans / (size // spans)
            crossing = whole * between * (2 if kind == "all-reduce" else 1)
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = f"{_PIECES}{channel.group(1)}" if channel and where in self.fused else f"{where}/{instruction.name}"
        hbm = in_hbm + sum(array_bytes(array, True) for array in arrays)
        return _Sum(hbm, 0, 0, {key: (kind, 1.0, sent - crossing, crossing)})

    # ---- loops ----

    def trips(self, where: str, loop: Instruction) -> int:
        """How often a loop runs; 1 where neither XLA nor its counter says."""
        noted = re.search(r"known_trip_count\D*(\d+)", loop.rest)
        if noted:
            return int(noted.group(1))
        condition = self.computations.get(attribute(loop, "condition"), [])
        body = attribute(loop, "body")
        inside = {i.name: i for i in condition}
        root = condition[-1] if condition else None
        if root is None or root.opcode != "compare" or len(root.operands) != 2:
            return 1
        counter, limit = (inside.get(name) for name in root.operands)
        if counter is None or limit is None or limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return 1
        index = int(attribute(counter, "index"))
        first = self._initial(where, loop, index)
        step = self._increment(body, index)
        last = int(limit.operands[0]) + ("direction=LE" in root.rest)
        return max(1, -(-(last - first) // step))

    def _initial(self, where: str, loop: Instruction, index: int) -> int:
        given = self.by_name[where].get(loop.operands[0]) if loop.operands else None
        value = self.by_name[where].get(given.operands[index]) if given and given.opcode == "tuple" else None
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = self.by_name[where].get(value.operands[0])
        text = value.operands[0] if value is not None and value.opcode == "constant" else ""
        return int(text) if re.fullmatch(r"-?\d+", text) else 0

    def _increment(self, body: str, index: int) -> int:
        names = self.by_name.get(body, {})
        root = self.computations[body][-1] if self.computations.get(body) else None
        value = names.get(root.operands[index]) if root and root.opcode == "tuple" else None
        total = 0
        while value is not None and value.opcode in (
            "add",
            "copy",
            "bitcast",
        ):  # counter + 1 + 1 of a loop unrolled by two
            constants = [names[n] for n in value.operands if n in names and names[n].opcode == "constant"]
            total += sum(int(c.operands[0]) for c in constants if re.fullmatch(r"-?\d+", c.operands[0]))
            others = [names[n] for n in value.operands if n in names and names[n].opcode != "constant"]
            value = others[0] if others else None
        return max(total, 1)

    def piled(self) -> tuple[int, int]:
        """Bytes of the stacks that the entry's loops fill, forward and backward: what they are given empty, one row a round."""
        found = [0, 0]
        names = self.by_name.get(self.entry, {})
        for loop in self.computations.get(self.entry, ()):
            if loop.opcode != "while" or not loop.operands or names[loop.operands[0]].opcode != "tuple":
                continue
            rounds = self.trips(self.entry, loop)
            for operand in names[loop.operands[0]].operands:
                made = names.get(operand)
                array = ARRAY.match(made.type) if made else None
                if made and array and (made.opcode == "broadcast" or "AllocateBuffer" in made.rest):
                    dims = array.group(2).split(",")
                    if dims[0] == str(rounds):
                        found["transpose(" in loop.rest] += array_bytes(made.type)
        return found[0], found[1]


def _through(name: str, users: dict[str, list[Instruction]]) -> Iterator[Instruction]:
    """Users of an array, seen through bitcasts."""
    for user in users.get(name, ()):
        if user.opcode == "bitcast":
            yield from _through(user.name, users)
        else:
            yield user


def _source(name: str, inside: dict[str, Instruction]) -> str:
    while name in inside and inside[name].opcode == "bitcast":
        name = inside[name].operands[0]
    return name
