"""Tuned models put together: adapter folders into one adapter, or adapters and whole models into one model, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune import fetch
from jaxtune.adapters import arithmetic, lora
from jaxtune.models import naming
from jaxtune.types import UserError
from jaxtune.weights import hf, peft_read
from jaxtune.weights.gguf import open_gguf
from jaxtune.weights.peft_names import ADAPTER, KERNEL

Table = Mapping[str, tuple[naming.Weight, tuple[int, ...]]]


class Part(NamedTuple):
    """One tuned model: an adapter's options and arrays by our paths, or a whole model's tensors."""

    uri: str
    path: Path
    options: lora.Options | None
    arrays: Mapping[str, np.ndarray]
    tensors: hf.Source | None

    def factors(self) -> dict[str, arithmetic.Factors]:
        """An adapter's update of each linear."""
        assert self.options is not None
        linears = [path.removesuffix(f"{ADAPTER}lora_a") for path in self.arrays if path.endswith(f"{ADAPTER}lora_a")]
        return {
            linear: arithmetic.Factors(
                self.arrays[f"{linear}{ADAPTER}lora_a"],
                self.arrays[f"{linear}{ADAPTER}lora_b"],
                self.options.scale(linear),
            )
            for linear in linears
        }


def read(uri: str, family: ModuleType, model_config: Any) -> Part:
    """Fetches a PEFT adapter folder, or a whole model: a folder or a GGUF file.

    Raises:
      UserError: neither of them, damaged, an adapter that does not fit the model, or one that keeps a head beside it.
    """
    path = fetch.local(uri)
    if path.is_file() and path.suffix == ".gguf":
        return Part(uri, path, None, {}, open_gguf(path))
    if path.is_dir() and (path / "adapter_config.json").is_file():
        options, arrays = peft_read.load(path, family, model_config)
        heads = sorted(name for name in arrays if ADAPTER not in name)
        if heads:
            raise UserError(
                f"{path} keeps a trained head beside its adapter ({heads[0]}), of which no sum makes sense; merge adapters without"
            )
        return Part(uri, path, options, arrays, None)
    if not path.is_dir() or not (path / "config.json").is_file():
        raise UserError(
            f"merge.adapters names {path}, which is neither a PEFT adapter folder (adapter_config.json) nor a model folder "
            "(config.json)"
        )
    if (path / "checkpoints").is_dir():  # its config.json is a run's
        raise UserError(
            f"merge.adapters names {path}, a run's workdir: name the result in it, {path}/adapter or /model"
        )
    return Part(uri, path, None, {}, hf.Folder(path))


def check_bases(parts: Iterable[Part]) -> None:
    """Refuses adapters that say of themselves that they stand on different models.

    Raises:
      UserError: naming two of them.
    """
    named: dict[str, Part] = {}
    for part in parts:
        told = peft_read.raw_config(part.path).get("base_model_name_or_path") if part.options else None
        if isinstance(told, str) and told:
            named.setdefault(Path(told).name.lower(), part)
    if len(named) > 1:
        (first, one), (second, other), *_ = named.items()
        raise UserError(
            f"{one.path} was trained on {first!r} and {other.path} on {second!r} (base_model_name_or_path): adapters of different bases "
            "do not add up. If it is one model under two names, set merge.check_bases=False"
        )


def one_adapter(
    parts: list[Part], weights: list[float], options: arithmetic.Options
) -> tuple[lora.Options, dict[str, np.ndarray], dict[str, int]]:
    """Returns the merged adapter, its scale 1, and the linears that not all parts have with how many do.

    Raises:
      UserError: as `arithmetic.adapters`.
    """
    merged, partly = arithmetic.adapters([part.factors() for part in parts], weights, options)
    most = max(update.rank for update in merged.values())
    own = {linear: update.rank for linear, update in merged.items() if update.rank != most}
    made = lora.Options(
        targets="|".join(sorted(merged)).replace(".", r"\."),
        rank=most,
        alpha=float(most),
        dtype=jnp.float32,
        rank_pattern=tuple(own.items()),
        alpha_pattern=tuple((linear, float(rank)) for linear, rank in own.items()),
    )
    arrays = {}
    for linear, update in merged.items():
        arrays[f"{linear}{ADAPTER}lora_a"] = np.ascontiguousarray(update.a, np.float32)
        arrays[f"{linear}{ADAPTER}lora_b"] = np.ascontiguousarray(update.b, np.float32)
    return made, arrays, partly


def scaled(arrays: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """An adapter whose update is `share` of what it was."""
    return {
        path: array * np.float32(share) if path.endswith(f"{ADAPTER}lora_b") else array
        for path, array in arrays.items()
    }


class Merged:
    """A source of tensors (`hf.Source`): base + share * merge of (part - base), made as they are asked for, the last one kept.

    W' = W + α merge(W₁ - W, W₂ - W, …): task arithmetic (arXiv:2212.04089), and over α interpolation of weights
    (arXiv:2109.01903). Adapters are what they do to the weight, DoRA's magnitudes included.

    Raises:
      UserError: a part lacks a tensor of the base, or has it in another shape.
    """

    def __init__(
        self, base: hf.Source, table: Table, parts: list[Part], weights: list[float], options: arithmetic.Options,
        share: float = 1.0,
    ):  # fmt: skip
        self.path, self.hf_config = base.path, base.hf_config
        self._base, self._table, self._parts = hf.with_prefix(base, table), table, parts
        self._weights, self._options, self._share = weights, options, share
        self._sources = [hf.with_prefix(part.tensors, table) if part.tensors else None for part in parts]
        self._last: tuple[str, Any] = ("", None)
        for part, source in zip(parts, self._sources, strict=True):
            if source is not None:
                self._check(part, source)

    def names(self) -> list[str]:
        return sorted(self._table)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str, rows: slice = slice(None), *rest: slice) -> np.ndarray:
        if name != self._last[0]:
            self._last = ("", None)
            self._last = (name, self._made(name))
        whole: np.ndarray = self._last[1]
        return whole[(rows, *rest)] if whole.ndim else whole

    def _made(self, name: str) -> np.ndarray:
        base = self._base.read(name).astype(np.float32)
        updates, weights = [], []
        for part, source, weight in zip(self._parts, self._sources, self._weights, strict=True):
            update = (
                source.read(name).astype(np.float32) - base
                if source is not None
                else self._of_adapter(part, name, base)
            )
            if update is not None:
                updates.append(update)
                weights.append(weight)
        if not updates or (self._options.method == "slerp" and len(updates) < 2):
            return base if not updates else base + np.float32(self._share * weights[0]) * updates[0]
        return base + np.float32(self._share) * arithmetic.dense(updates, weights, self._options, name)

    def _of_adapter(self, part: Part, name: str, base: np.ndarray) -> np.ndarray | None:
        """What an adapter adds to a stored weight; None where it adds nothing."""
        weight, place = self._table[name]
        linear = weight.ours.removesuffix(KERNEL)
        if not weight.ours.endswith(KERNEL) or f"{linear}{ADAPTER}lora_a" not in part.arrays:
            return None
        assert part.options is not None
        a, b = (part.arrays[f"{linear}{ADAPTER}{kind}"][place].astype(np.float32) for kind in ("lora_a", "lora_b"))
        update = np.matmul(a, b) * np.float32(part.options.scale(linear))
        if part.options.use_dora:
            kernel = np.swapaxes(base, -1, -2) if weight.transpose else base
            whole, magnitude = kernel + update, part.arrays[f"{linear}{ADAPTER}magnitude"][place].astype(np.float32)
            update = whole * (magnitude / np.linalg.norm(whole, axis=-2))[..., None, :] - kernel
        return np.swapaxes(update, -1, -2) if weight.transpose else update

    def _check(self, part: Part, source: hf.Source) -> None:
        have = set(source.names())
        missing = [name for name in self._table if name not in have]
        if missing:
            raise UserError(
                f"{part.path} lacks {missing[0]!r}, which the base has ({len(missing)} in all): expected a model tuned from "
                f"{self.path}"
            )
        for name in self._table:
            if tuple(source.shape(name)) != tuple(self.shape(name)):
                raise UserError(
                    f"{part.path} has {name!r} of shape {tuple(source.shape(name))}, and the base {tuple(self.shape(name))}: expected a "
                    f"model tuned from {self.path}"
                )
