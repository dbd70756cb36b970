"""Adapters on experts as PEFT has them, and back: it fuses what jaxtune keeps apart.

transformers 5 keeps a layer's experts in one module of two parameters, whatever the files hold: gate_up_proj and down_proj.
PEFT wraps the module once for each parameter that it adapts (`target_parameters`), gate_up_proj first: where both are
adapted, gate_up_proj's wrapper is the other's `base_layer`. Of each it stores, for E experts and rank r,

    lora_A.weight  (E r, in)   expert by expert
    lora_B.weight  (out, r E)  rank by rank, the experts of a rank side by side
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

PARAMETERS = ("gate_up_proj", "down_proj")  # inner wrapper first


class Factors(NamedTuple):
    """An update scale * A B of all experts of some layers: A (L, E, in, r), B (L, E, r, out)."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def fused(parts: Mapping[str, Factors]) -> dict[str, Factors]:
    """Our linear's name -> its factors; as PEFT's parameters, inner wrapper first.

    A gate of rank r beside an up of rank q is one update of rank r + q, whose B holds the two in blocks.
    """
    found = {name: parts[name] for name in PARAMETERS if name in parts}
    gate, up = parts.get("gate_proj"), parts.get("up_proj")
    sides = [side for side in (gate, up) if side is not None]
    if sides:
        scale = sides[0].scale
        b_gate = [] if gate is None else [np.concatenate([gate.b, np.zeros_like(gate.b)], -1)]
        b_up = [] if up is None else [np.concatenate([np.zeros_like(up.b), up.b * (up.scale / scale)], -1)]
        a = np.concatenate([side.a for side in sides], -1)
        found = {"gate_up_proj": Factors(a, np.concatenate([*b_gate, *b_up], -2), scale), **found}
    return found


def apart(both: Factors) -> dict[str, Factors]:
    """gate_up_proj's factors as those of gate_proj and up_proj: the inverse of `fused` on what it made, else A is copied."""
    a, b, width, half = both.a, both.b, both.b.shape[-1] // 2, both.rank // 2
    gate, up = b[..., :width], b[..., width:]
    if gate.any() != up.any():
        return {"gate_proj": both._replace(b=gate)} if gate.any() else {"up_proj": both._replace(b=up)}
    if both.rank % 2 == 0 and not gate[..., half:, :].any() and not up[..., :half, :].any():
        first, second = slice(None, half), slice(half, None)
        return {
            "gate_proj": Factors(a[..., first], gate[..., first, :], both.scale),
            "up_proj": Factors(a[..., second], up[..., second, :], both.scale),
        }
    return {"gate_proj": both._replace(b=gate), "up_proj": both._replace(b=up)}


def stored(a_EIR: np.ndarray, b_ERO: np.ndarray) -> dict[str, np.ndarray]:
    """One layer's factors as PEFT's two tensors."""
    A, B = a_EIR.transpose(0, 2, 1), b_ERO.transpose(2, 1, 0)
    tensors = {"lora_A.weight": A.reshape(-1, A.shape[-1]), "lora_B.weight": B.reshape(B.shape[0], -1)}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def read(A: np.ndarray, B: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `stored`: A (E, in, r), B (E, r, out)."""
    a = A.reshape(num_experts, -1, A.shape[-1]).transpose(0, 2, 1)
    return a, B.reshape(B.shape[0], -1, num_experts).transpose(2, 1, 0)
