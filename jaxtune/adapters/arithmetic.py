"""Arithmetic of what tuning added: several updates of one base become one. Pure functions, NumPy only.

An *update* is what is added to a base weight: a dense tensor, or two factors. `cat` is the exact weighted sum. The other names
are PEFT's (`add_weighted_adapter`): `linear`, `magnitude_prune`, `ties` (arXiv:2306.01708), `dare_linear` and `dare_ties`
(arXiv:2311.03099) work on each factor by itself, which is quick and, with more than one adapter, rough; with `_svd` behind the
name they work on the dense update, of which the leading singular vectors are kept. `slerp` turns one update into another.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.types import UserError

_OF_TENSORS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
DENSE_METHODS = ("cat", *_OF_TENSORS, "slerp")  # on whole weights, where cat is linear
METHODS = (*DENSE_METHODS, "svd", *(f"{name}_svd" for name in _OF_TENSORS if name != "linear"))
_COLLINEAR = 1e-6  # sine of an angle below which two directions are one


class Options(NamedTuple):
    """How updates are merged.

    `density` is the share of an update's numbers that pruning keeps; `majority` elects the sign of each number by the sum of
    the values (total) or of the signs (frequency); `rank` is the result's where singular vectors are dropped, 0 = the largest
    of its parts; `seed` draws what DARE drops.
    """

    method: str = "cat"
    density: float = 0.5
    majority: str = "total"
    rank: int = 0
    seed: int = 0


class Factors(NamedTuple):
    """An update scale * A B of some layers, with A (…, in, r) and B (…, r, out)."""

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])

    @property
    def dense(self) -> np.ndarray:
        """The update itself (…, in, out), float64."""
        return np.matmul(self.a.astype(np.float64), self.b.astype(np.float64)) * self.scale


# ---- tensors ----


def by_magnitude(tensor: np.ndarray, density: float) -> np.ndarray:
    """Returns the tensor with all but its `density` share of largest numbers at 0."""
    keep = int(density * tensor.size)
    if keep >= tensor.size:
        return tensor
    flat, kept = tensor.reshape(-1), np.zeros(tensor.size, tensor.dtype)
    largest = np.argpartition(np.abs(flat), tensor.size - keep)[tensor.size - keep :]
    kept[largest] = flat[largest]
    return kept.reshape(tensor.shape)


def mask(shape: tuple[int, ...], density: float, seed: int, name: str) -> np.ndarray:
    """Returns what DARE keeps: each element with probability `density`, drawn from the seed and a name alone."""
    if density >= 1:
        return np.ones(shape, bool)
    key = np.random.Philox(key=[seed, zlib.crc32(name.encode())])
    return np.random.Generator(key).random(shape, np.float32) < density


def majority_signs(tensors_N: np.ndarray, majority: str) -> np.ndarray:
    """Returns which numbers of (N, …) have the sign that the N elect, 0 having none; a draw elects the positive."""
    signs = np.sign(tensors_N)
    votes = (tensors_N if majority == "total" else signs).sum(0)
    return np.asarray(signs == np.where(votes >= 0, 1, -1))


def disjoint_mean(tensors_N: np.ndarray, kept_N: np.ndarray) -> np.ndarray:
    """Returns, of (N, …), the mean over those numbers that are kept; 0 where none is."""
    return np.asarray((tensors_N * kept_N).sum(0) / np.maximum(kept_N.sum(0), 1).astype(tensors_N.dtype))


def of_tensors(
    tensors: Sequence[np.ndarray], weights: Sequence[float], options: Options, masks: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Returns the merge of tensors of one shape; `masks` are what DARE keeps of each.

    TIES: prune, elect a sign for each number, take the mean of those that have it. DARE: drop at random, divide the rest by the
    density, so that the expectation stays. The sum is linear, the task vectors' own (arXiv:2212.04089).
    """
    kind = options.method.removesuffix("_svd")
    if kind.startswith("dare"):
        tensors = [np.where(kept, x / options.density, 0) for x, kept in zip(tensors, masks, strict=True)]
    elif kind in ("ties", "magnitude_prune"):
        tensors = [by_magnitude(tensor, options.density) for tensor in tensors]
    stacked_N = np.stack(tensors)
    weighted_N = stacked_N * np.asarray(weights, stacked_N.dtype).reshape(-1, *[1] * tensors[0].ndim)
    if kind.endswith("ties"):
        return disjoint_mean(weighted_N, majority_signs(stacked_N, options.majority))
    return np.asarray(weighted_N.sum(0))


def turning(first_norm: float, second_norm: float, dot: float, share: float) -> tuple[float, float]:
    """Returns the weights of two updates `share` of the way along the arc between them (Shoemake 1985, doi:10.1145/325165.325242).

    sin((1 - t) Ω) / sin Ω and sin(t Ω) / sin Ω, with Ω the angle between them; (1 - t, t) where they have one direction, or
    one of them is 0.
    """
    both = first_norm * second_norm
    angle = math.acos(max(-1.0, min(1.0, dot / both))) if both > 0 else 0.0
    if math.sin(angle) < _COLLINEAR:
        return 1 - share, share
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def dense(updates: Sequence[np.ndarray], weights: Sequence[float], options: Options, name: str) -> np.ndarray:
    """Returns the merge of dense updates of one weight; `name` tells the draws of one weight from another's."""
    if options.method == "slerp":
        first, second = (update.astype(np.float64).reshape(-1) for update in updates)
        pair = turning(float(np.linalg.norm(first)), float(np.linalg.norm(second)), float(first @ second), weights[1])
        return of_tensors(updates, pair, options._replace(method="linear"))
    return of_tensors(updates, weights, options, _masks(updates, options, name))


def _masks(tensors: Sequence[np.ndarray], options: Options, name: str) -> list[np.ndarray]:
    if not options.method.startswith("dare"):
        return []
    named = [f"{name}#{number}" for number in range(len(tensors))]
    return [mask(x.shape, options.density, options.seed, one) for x, one in zip(tensors, named, strict=True)]


# ---- factors ----


def factors(updates: Sequence[Factors], weights: Sequence[float], options: Options, name: str) -> Factors:
    """Returns the merge of low-rank updates of one stack of layers, each layer by itself; its scale is 1.

    Raises:
      UserError: ranks differ where factors are merged one by one; the message names what to do.
    """
    ranks = sorted({update.rank for update in updates})
    if options.method in _OF_TENSORS and len(ranks) > 1:
        raise UserError(
            f"merge.method={options.method!r} merges factor by factor, and the adapters' ranks on {name} are {ranks}: set "
            f"merge.method='cat' or 'svd'{f' or {options.method}_svd' * (options.method != 'linear')}"
        )
    lead = updates[0].a.shape[:-2]
    made = []
    for place in np.ndindex(*lead):
        layer = [update._replace(a=update.a[place], b=update.b[place]) for update in updates]
        made.append(_layer(layer, weights, options, f"{name}{list(place)}"))
    a, b = (np.stack([pair[side] for pair in made]) for side in (0, 1))
    return Factors(a.reshape(*lead, *a.shape[1:]), b.reshape(*lead, *b.shape[1:]))


def _layer(updates: list[Factors], weights: Sequence[float], options: Options, name: str) -> tuple[Any, Any]:
    if options.method == "slerp":
        return _joined(updates, _turning(updates[0], updates[1], weights[1]))
    if options.method == "cat":
        return _joined(updates, weights)
    if options.method == "svd":
        a, b = _joined(updates, weights)
        (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.T)
        left, right = _leading(r_a @ r_b.T, _rank(updates, options))
        return q_a @ left, right @ q_b.T
    if options.method.endswith("_svd"):
        return _leading(dense([update.dense for update in updates], weights, options, name), _rank(updates, options))
    scaled = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    roots = [math.sqrt(abs(weight)) for weight in scaled]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]  # on one side alone
    sides = []
    for side, by in (("a", signed), ("b", roots)):
        tensors = [getattr(update, side).astype(np.float64) for update in updates]
        sides.append(of_tensors(tensors, by, options, _masks(tensors, options, f"{name}.{side}")))
    return sides[0], sides[1]


def _joined(updates: Sequence[Factors], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The weighted sum of low-rank updates, side by side: its rank is the sum of theirs."""
    a = [u.a.astype(np.float64) * (weight * u.scale) for weight, u in zip(weights, updates, strict=True)]
    return np.concatenate(a, -1), np.concatenate([update.b.astype(np.float64) for update in updates], -2)


def _turning(first: Factors, second: Factors, share: float) -> tuple[float, float]:
    """`turning` of the dense updates, which are not made: <A B, C D> = tr((AᵀC)(D Bᵀ))."""

    def dot(x: Factors, y: Factors) -> float:
        a, b, c, d = (side.astype(np.float64) for side in (x.a, x.b, y.a, y.b))
        return float(np.sum((a.T @ c) * (b @ d.T))) * x.scale * y.scale

    norms = [math.sqrt(max(0.0, dot(one, one))) for one in (first, second)]
    return turning(norms[0], norms[1], dot(first, second), share)


def _rank(updates: Sequence[Factors], options: Options) -> int:
    return options.rank or max(update.rank for update in updates)


def _leading(update: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest update of a rank, as factors: with U S Vᵀ its singular value decomposition, U S^½ and S^½ Vᵀ of the leading."""
    left, values, right = np.linalg.svd(update, full_matrices=False)
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def adapters(
    parts: Sequence[Mapping[str, Factors]], weights: Sequence[float], options: Options
) -> tuple[dict[str, Factors], dict[str, int]]:
    """Returns (each linear's merged update, the linears that not all adapters have and how many do).

    Like PEFT, a linear that some adapters leave alone is merged from those that change it.

    Raises:
      UserError: as `factors`; `slerp` between adapters of different linears.
    """
    merged, partly = {}, {}
    for linear in dict.fromkeys(linear for part in parts for linear in part):
        have = [(part[linear], weight) for part, weight in zip(parts, weights, strict=True) if linear in part]
        if len(have) < len(parts):
            partly[linear] = len(have)
            if options.method == "slerp":
                raise UserError(
                    f"merge.method='slerp' turns one update into another, and only one of the adapters changes {linear}: set "
                    "merge.method='cat'"
                )
        merged[linear] = factors([update for update, _ in have], [weight for _, weight in have], options, linear)
    return merged, partly
