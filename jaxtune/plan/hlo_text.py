"""The text of a compiled program, read: instructions, the sizes of arrays, and who takes part in a collective."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|c64|c128|f8\w+|f4\w+|s4|u4)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]  # names; of a constant or a parameter, the text in the parentheses
    rest: str


def array_bytes(type_text: str, hbm_only: bool = False) -> int:
    """Bytes of the arrays in a type; with `hbm_only` those that do not lie in another memory. Padding is not counted."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(type_text):
        space = re.search(r"S\((\d+)\)", layout)
        if not (hbm_only and space and space.group(1) != "0"):
            total += elements(dims) * _bits(dtype) / 8
    return math.ceil(total)


def elements(dims: str) -> int:
    return math.prod(int(size.lstrip("<=")) for size in dims.split(",") if size)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions, the root last, and the name of the entry.

    An operand that newer XLA writes as `%tuple#1` becomes the get-tuple-element that older XLA writes out.
    """
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("  ") and " = " in line:
            current.append(_instruction(line))
    return {name: _with_elements(body) if "#" in text else body for name, body in computations.items()}, entry


def _with_elements(body: list[Instruction]) -> list[Instruction]:
    """The instructions with a get-tuple-element before the first use of each element."""
    types = {instruction.name: instruction.type for instruction in body}
    found: list[Instruction] = []

    def take(name: str) -> None:
        whole, _, index = name.rpartition("#")
        if not whole or name in types:
            return
        take(whole)
        types[name] = _element(types.get(whole, "()"), int(index))
        found.append(Instruction(name, types[name], "get-tuple-element", (whole,), f", index={index}"))

    for instruction in body:
        for operand in () if instruction.opcode in ("constant", "parameter") else instruction.operands:
            take(operand)
        found.append(instruction)
    return found


def _element(tuple_type: str, index: int) -> str:
    """The type of one element of a tuple's."""
    depth, starts, inside = 0, [0], tuple_type[1:-1]
    for at, letter in enumerate(inside):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            starts.append(at + 1)
    ends = [*(start - 1 for start in starts[1:]), len(inside)]
    return inside[starts[index] : ends[index]].strip() if index < len(starts) else ""


def _instruction(line: str) -> Instruction:
    left, _, right = line.partition(" = ")
    name = left.split()[-1].lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    stop = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : stop]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(name, kind, opcode, operands, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text) - 1


def attribute(instruction: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.rest)
    return found.group(1) if found else ""


def branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return _NAME.findall(listed.group(1))
    return [attribute(instruction, key) for key in ("true_computation", "false_computation")]


def groups(instruction: Instruction, kind: str, num_devices: int) -> np.ndarray:
    """Device numbers, a row per group."""
    rest, everyone = instruction.rest, np.arange(max(num_devices, 1))[None]
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
    if kind == "collective-permute":
        found = re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)) if pairs else []
        return np.asarray([[int(a), int(b)] for a, b in found] or [[0, 0]])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, reshaped = ([int(n) for n in iota.group(i).split(",")] for i in (1, 2))
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        ids = ids.transpose([int(n) for n in iota.group(3).split(",")]) if iota.group(3) else ids
        return ids.reshape(shape)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if named:
        axes = re.findall(r"'([^']+)'=(\d+)", named.group(1))
        return _mesh_groups([(name, int(size)) for name, size in axes], named.group(2), everyone)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest)
    if listed:
        return np.asarray(
            [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        )
    return everyone


def _mesh_groups(axes: list[tuple[str, int]], used: str, everyone: np.ndarray) -> np.ndarray:
    """Groups over named axes of a mesh; an axis as 'a':(p)s is its part of size s after parts of size p."""
    names, sizes, wanted = [], [], []
    parts = {m.group(1): (int(m.group(2)), int(m.group(3))) for m in re.finditer(r"'([^']+)':\((\d+)\)(\d+)", used)}
    plain = set(re.findall(r"'([^']+)'(?!:)", used))
    for name, size in axes:
        before, middle = parts.get(name, (1, size))
        names += [(name, 0), (name, 1), (name, 2)]
        sizes += [before, middle, size // (before * middle)]
        wanted += [name in plain, name in plain or name in parts, name in plain]
    if not names:
        return everyone
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    last = [i for i, want in enumerate(wanted) if want]
    first = [i for i, want in enumerate(wanted) if not want]
    return ids.transpose(first + last).reshape(-1, math.prod(sizes[i] for i in last))
