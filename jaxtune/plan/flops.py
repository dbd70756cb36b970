"""FLOPs of a step, counted one by one on the program itself (its jaxpr), before any compiler.

Counted are multiply-adds, as two: `dot_general`, `ragged_dot_general`, convolutions, and what kernels multiply. Elementwise
work is not. Scans count as often as they run, so do micro-batches; of a `cond` the largest branch counts (a chunk of the loss
in which nothing trains would be skipped: it counts in full); a `while` whose length is not in the program cannot hold a
multiplication. Inside a `shard_map` shapes are one device's, so they count once per device.

`hardware` is what is executed: the step after differentiation, so that what is computed again for the backward pass counts
again. `model` is what the mathematics asks for (the convention of "model FLOPs utilisation"): each multiplication of the
forward pass once, and once more for each operand that a trainable weight reaches. A frozen weight so costs 2 FLOPs per
parameter and token forward and 2 for the gradient that flows through it, and nothing for a gradient of its own; a LoRA
factor costs all 6.

A kernel (`pallas_call`) counts per point of its grid; splash attention by the block mask that it is given: blocks that the
causal mask or a window leaves empty are not computed and do not count, blocks on the edge are computed whole and do; flash
attention by the rounds of its loops, likewise. Segments inside a packed row skip nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from jaxtune.types import UserError

# What the ends of a kernel's loops are made of.
_COUNTING: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.floor_divide}


class Dot(NamedTuple):
    """A multiplication (batch, m, k) x (batch, k, n) of one dtype; `kind` is dot, ragged, conv or kernel."""

    kind: str
    batch: int
    m: int
    k: int
    n: int
    dtype: str

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


Dots = Counter[Dot]  # how often each multiplication is done, over all devices


def total(dots: Mapping[Dot, float]) -> float:
    """FLOPs in all."""
    return sum(dot.flops * count for dot, count in dots.items())


def by_dtype(dots: Dots) -> dict[str, float]:
    """FLOPs by the dtype that is multiplied."""
    found: dict[str, float] = {}
    for dot, count in dots.items():
        found[dot.dtype] = found.get(dot.dtype, 0.0) + dot.flops * count
    return found


def hardware(traced: Any) -> Dots:
    """What a traced function (`jax.jit(f).trace(…)`) executes, over all devices.

    Raises:
      UserError: it multiplies inside a loop whose length the program does not say.
    """
    closed = traced.jaxpr
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return _Walk().jaxpr(used, dict(zip(used.constvars, closed.consts, strict=True)), set())


def model(traced: Any, num_trainable: int) -> Dots:
    """What training by a traced forward pass asks for; its first `num_trainable` inputs are what trains."""
    closed = traced.jaxpr
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return _Walk(backward=True).jaxpr(closed.jaxpr, known, set(closed.jaxpr.invars[:num_trainable]))


def _add(into: Dots, more: Mapping[Dot, float], times: float = 1) -> None:
    for dot, count in more.items():
        into[dot] += count * times  # type: ignore[assignment]


class _Walk:
    """One walk over a jaxpr. `known` maps variables to arrays that the program holds as constants (kernels' block masks);
    `active` are variables that a trainable weight reaches, followed where `backward` work is to be counted.

    `values` numbers the variables of a body so that equal numbers are equal values, and `made` has for each value how it comes
    about: what is computed twice in one body is executed once, as compilers do (a rematerialised part inside a rematerialised
    whole). A scan, a branch, a kernel and a `remat` that forbids it are bodies of their own.
    """

    def __init__(self, backward: bool = False, rounds: Mapping[Any, float] | None = None):
        self.backward, self.rounds = backward, rounds or {}
        self.values: dict[Any, Any] = {}
        self.made: dict[Any, tuple[Any, ...]] = {}

    def jaxpr(self, jaxpr: Any, known: dict[Any, Any], active: set[Any]) -> Dots:
        """Counts one body; adds to `active` what it makes."""
        dots: Dots = Counter()
        for eqn in jaxpr.eqns:
            if not self._seen(eqn):
                self._equation(eqn, dots, known, active)
        return dots

    def _value(self, atom: Any) -> Any:
        return self.values.setdefault(atom, object()) if _is_var(atom) else (repr(atom.val), str(atom.aval))

    def _seen(self, eqn: Any) -> bool:
        """Whether this very value is at hand; takes note of it."""
        if self.backward or eqn.effects or any(hasattr(p, "eqns") or hasattr(p, "jaxpr") for p in eqn.params.values()):
            return False
        key = (eqn.primitive.name, repr(eqn.params), *(self._value(atom) for atom in eqn.invars))
        seen = key in self.made
        self.values.update(
            zip(eqn.outvars, self.made.setdefault(key, tuple(object() for _ in eqn.outvars)), strict=True)
        )
        return seen

    def _equation(self, eqn: Any, dots: Dots, known: dict[Any, Any], active: set[Any]) -> None:
        name = eqn.primitive.name
        reached = [_is_var(v) and v in active for v in eqn.invars]
        out = any(reached) and name not in ("stop_gradient",)
        flags = [out] * len(eqn.outvars)
        if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            times = 1 + (sum(reached[:2]) if self.backward else 0)
            _add(dots, {_multiplied(eqn): times})
        elif name == "scan":
            flags = self._scan(eqn, dots, known, reached)
        elif name == "while":
            once: Dots = Counter()
            for part in ("cond_jaxpr", "body_jaxpr"):
                _add(once, _Walk().jaxpr(eqn.params[part].jaxpr, {}, set()))
            rounds = self.rounds.get(eqn.outvars[0])
            if once and rounds is None:
                raise UserError(
                    "the step multiplies inside a while loop whose length the program does not say, so its FLOPs cannot be "
                    "counted; write it as a scan"
                )
            _add(dots, once, rounds or 0.0)
        elif name == "cond":
            flags = self._largest(eqn, dots, known, reached)
        elif name == "pallas_call":
            _add(dots, self._kernel(eqn, known), 3 if self.backward and out else 1)
        else:
            flags = self._called(eqn, dots, known, reached, flags)
        active.update(var for var, flag in zip(eqn.outvars, flags, strict=True) if flag and _is_float(var))

    def _body(
        self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any], known: dict[Any, Any], reached: Sequence[bool]
    ) -> tuple[Dots, list[bool]]:
        """One inner body, told what is known and active of its operands; also which of its outputs are active."""
        inside = dict(zip(jaxpr.constvars, consts, strict=False))
        for var, given in zip(jaxpr.invars, operands, strict=True):
            if _is_var(given) and given in known and np.shape(known[given]) == var.aval.shape:
                inside[var] = known[given]
        active = {var for var, flag in zip(jaxpr.invars, reached, strict=True) if flag}
        dots = self.jaxpr(jaxpr, inside, active)
        return dots, [_is_var(var) and var in active for var in jaxpr.outvars]

    def _apart(self, *body: Any) -> tuple[Dots, list[bool]]:
        """A body that shares no values with what surrounds it."""
        return _Walk(self.backward)._body(*body)

    def _scan(self, eqn: Any, dots: Dots, known: dict[Any, Any], reached: list[bool]) -> list[bool]:
        closed, (num_consts, num_carry) = eqn.params["jaxpr"], scanned(eqn.params)
        fixed = {v: known[v] for v in eqn.invars[:num_consts] if _is_var(v) and v in known}
        while True:  # what a round makes active is active in the next
            once, flags = self._apart(closed.jaxpr, closed.consts, eqn.invars, fixed, reached)
            carry = [a or b for a, b in zip(reached[num_consts : num_consts + num_carry], flags, strict=False)]
            if carry == reached[num_consts : num_consts + num_carry]:
                break
            reached = [*reached[:num_consts], *carry, *reached[num_consts + num_carry :]]
        _add(dots, once, eqn.params["length"])
        return flags

    def _largest(self, eqn: Any, dots: Dots, known: dict[Any, Any], reached: list[bool]) -> list[bool]:
        found = [
            self._apart(branch.jaxpr, branch.consts, eqn.invars[1:], known, reached[1:])
            for branch in eqn.params["branches"]
        ]
        _add(dots, max((each for each, _ in found), key=lambda each: total(each)))
        return [any(flags) for flags in zip(*(flags for _, flags in found), strict=True)]

    def _called(
        self, eqn: Any, dots: Dots, known: dict[Any, Any], reached: list[bool], flags: list[bool]
    ) -> list[bool]:
        """jit, remat, custom derivatives (their primal) and shard_map: bodies that take the equation's operands as they are."""
        body = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        if body is None:
            return flags
        jaxpr, consts = (body.jaxpr, body.consts) if hasattr(body, "jaxpr") else (body, ())
        if len(jaxpr.invars) != len(eqn.invars):
            return flags
        times = 1
        if eqn.primitive.name == "shard_map":
            manual = (
                eqn.params.get("manual_axes") or eqn.params.get("newly_manual_axes") or eqn.params["mesh"].axis_names
            )
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in manual)
        if times > 1 or eqn.params.get("prevent_cse"):
            once, flags = self._apart(jaxpr, consts, eqn.invars, known, reached)
        else:
            once, flags = self._inlined(jaxpr, consts, eqn, known, reached)
        _add(dots, once, times)
        return flags

    def _inlined(
        self, jaxpr: Any, consts: Any, eqn: Any, known: dict[Any, Any], reached: list[bool]
    ) -> tuple[Dots, list[bool]]:
        """A body that is part of this one: its values are this one's."""
        inner = _Walk(self.backward)
        inner.made = self.made
        inner.values = dict(zip(jaxpr.invars, map(self._value, eqn.invars), strict=True))
        found = inner._body(jaxpr, consts, eqn.invars, known, reached)
        self.values.update(zip(eqn.outvars, map(inner._value, jaxpr.outvars), strict=True))
        return found

    def _kernel(self, eqn: Any, known: dict[Any, Any]) -> Dots:
        grid_mapping = eqn.params["grid_mapping"]
        if not all(isinstance(size, int | np.integer) for size in grid_mapping.grid):
            raise UserError("the step has a kernel whose grid depends on data, so its FLOPs cannot be counted")
        times = math.prod(int(size) for size in grid_mapping.grid) * _computed_share(eqn, known)
        dots: Dots = Counter()
        for dot, count in _Walk(rounds=_rounds(eqn)).jaxpr(eqn.params["jaxpr"], {}, set()).items():
            dots[dot._replace(kind="kernel")] += count * times  # type: ignore[assignment]
        return dots


def scanned(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands every round sees, and how many go from round to round."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(list(consts)), len(list(carry))


def _computed_share(eqn: Any, known: dict[Any, Any]) -> float:
    """Of a splash attention kernel's blocks, the share that its mask does not leave empty; 1 where there is no such mask."""
    name = str(eqn.params.get("name") or getattr(eqn.params.get("name_and_src_info"), "name", ""))
    if not name.startswith("splash") or eqn.params["grid_mapping"].num_index_operands < 2:
        return 1.0
    mask = eqn.invars[1]  # its index operands: which block comes next, and what is in each
    value = known.get(mask) if _is_var(mask) else mask.val
    return 1.0 if value is None else float(np.mean(np.asarray(value) != 0))


def _rounds(kernel: Any) -> dict[Any, float]:
    """How often a kernel's loops that count from one number to another go round, by their counter: in the mean over its grid."""
    mapping, found = kernel.params["grid_mapping"], {}
    places = np.ogrid[tuple(slice(int(n)) for dim, n in enumerate(mapping.grid) if dim not in mapping.vmapped_dims)]
    known: dict[Any, Any] = {}
    for eqn in kernel.params["jaxpr"].eqns:
        name = eqn.primitive.name
        given = [known.get(atom) if _is_var(atom) else atom.val for atom in eqn.invars]
        if name == "program_id":
            known[eqn.outvars[0]] = places[eqn.params["axis"]]
        elif name in _COUNTING and all(value is not None for value in given):
            known[eqn.outvars[0]] = _COUNTING[name](*given)
        elif name == "while" and [each.primitive.name for each in eqn.params["cond_jaxpr"].eqns] == ["lt"]:
            first, end = given[eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] :][:2]  # as `fori_loop` has them
            if first is not None and end is not None:
                found[eqn.outvars[0]] = float(np.mean(np.maximum(end - first, 0)))
    return found


def _multiplied(eqn: Any) -> Dot:
    lhs, rhs = (var.aval for var in eqn.invars[:2])
    dtype = str(lhs.dtype)
    if eqn.primitive.name == "conv_general_dilated":
        numbers, out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
        n = out.shape[numbers.out_spec[1]]
        k = math.prod(rhs.shape) // rhs.shape[numbers.rhs_spec[0]]
        return Dot("conv", 1, math.prod(out.shape) // n, k, n, dtype)
    if eqn.primitive.name == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        ((_, contracted), (_, batched)) = numbers.dot_dimension_numbers
        taken = {*contracted, *batched, *numbers.rhs_group_dimensions}
        n = math.prod(size for dim, size in enumerate(rhs.shape) if dim not in taken)
        k = math.prod(lhs.shape[dim] for dim in numbers.dot_dimension_numbers[0][0])
        return Dot("ragged", 1, math.prod(lhs.shape) // k, k, n, dtype)
    ((lhs_contracted, rhs_contracted), (lhs_batched, _)) = eqn.params["dimension_numbers"]
    batch = math.prod(lhs.shape[dim] for dim in lhs_batched)
    k = math.prod(lhs.shape[dim] for dim in lhs_contracted)
    each = max(batch * k, 1)
    return Dot("dot", batch, math.prod(lhs.shape) // each, k, math.prod(rhs.shape) // each, dtype)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _is_float(var: Any) -> bool:
    return hasattr(var.aval, "dtype") and jax.dtypes.issubdtype(var.aval.dtype, np.inexact)
