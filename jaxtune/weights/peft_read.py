"""PEFT adapter folders, read: an adapter made elsewhere is taken whole, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.lora import Options
from jaxtune.models import naming
from jaxtune.types import UserError
from jaxtune.weights import peft_experts
from jaxtune.weights.peft_experts import Factors
from jaxtune.weights.peft_names import ADAPTER, INNER, PREFIX, SUFFIX, layer_of, modules_of, renamed, root

# PEFT settings that change the adapter's maths and are not read here, with the value at which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "fan_in_fan_out": (None, False),
    "lora_bias": (None, False), "trainable_token_indices": (None, [], {}), "layer_replication": (None, []), "use_qalora": (None, False), "alora_invocation_tokens": (None, []), "use_bdlora": (None, False),
    "arrow_config": (None,), "exclude_modules": (None, []), "kasa_config": (None,), "monteclora_config": (None,),
    # the others (PiSSA, OLoRA, CorDA, LoftQ …) take part of the base weight away, and the adapter stands on what is left
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


def raw_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as it stands.

    Raises:
      UserError: there is none, or it is no JSON object.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a PEFT adapter folder: expected adapter_config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; expected an object")
    return config


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of `adapter_model.safetensors`, by name.

    Raises:
      UserError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, np.ndarray] = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/adapter_model.safetensors cannot be read ({error})") from None
    return found


def read_config(folder: Path, tune_dtype: str = "float32") -> tuple[dict[str, Any], Options]:
    """Reads `adapter_config.json`: (as it stands, our options with the targets still unresolved).

    Raises:
      UserError: it is no LoRA adapter folder, or uses a PEFT setting that jaxtune does not read.
    """
    file, config = folder / "adapter_config.json", raw_config(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{file} has peft_type={config.get('peft_type')!r}; jaxtune reads 'LORA', and with tune.method='prompt' 'PROMPT_TUNING'"
        )
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise UserError(
                f"{file} has {name}={config[name]!r}, which jaxtune does not read; merge that adapter with PEFT first"
            )
    for names in (("r",), ("target_modules", "target_parameters")):
        if not any(config.get(name) for name in names):
            raise UserError(f"{file} lacks {names[0]!r}")
    _check_numbers(file, config)
    alpha, dropout = config.get("lora_alpha"), config.get("lora_dropout")
    options = Options(
        targets="", rank=config["r"], alpha=float(8 if alpha is None else alpha), dropout=float(dropout or 0),
        use_rslora=bool(config.get("use_rslora")), use_dora=bool(config.get("use_dora")), dtype=jnp.dtype(tune_dtype),
        layers=_layers(file, config),
    )  # fmt: skip
    return config, options


def _layers(file: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """`layers_to_transform`, a number or several; () = all."""
    given = config.get("layers_to_transform")
    found = [] if given is None else given if isinstance(given, list) else [given]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in found):
        raise UserError(f"{file} has layers_to_transform={given!r:.60}; expected numbers of layers")
    return tuple(sorted(set(found)))


def _check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    patterns = {name: {} if config.get(name) is None else config[name] for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise UserError(f"{file} has {name}={pattern!r:.60}; expected an object, module name to number")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise UserError(f"{file} has {name} for {key!r}, which is not a regular expression: {error}") from None
    numbers = {name: config[name] for name in ("r", "lora_alpha", "lora_dropout") if config.get(name) is not None}
    numbers |= {f"{name} for {key!r}": value for name, pattern in patterns.items() for key, value in pattern.items()}
    for name, value in numbers.items():
        kind, least = (int, 1) if name.startswith("r") else (int | float, 0)
        zero = value == 0 and not name.startswith("lora_dropout")
        if isinstance(value, bool) or not isinstance(value, kind) or value < least or zero:
            raise UserError(f"{file} has {name}={value!r}; expected a {'whole ' * (kind is int)}number above 0")


def load(
    folder: Path, family: ModuleType, model_config: Any, tune_dtype: str = "float32"
) -> tuple[Options, dict[str, np.ndarray]]:
    """Returns (options whose `targets` names exactly the adapted linears, our path -> host array, layers stacked); a head
    that was saved beside the adapter is among the arrays.

    Raises:
      UserError: a tensor of a layer is missing, belongs to no linear of this model, or layers differ in rank or alpha.
    """
    config, options = read_config(folder, tune_dtype)
    have = {renamed(name): tensor for name, tensor in tensors(folder).items()}
    bare = not any(name.startswith(PREFIX + root(family, model_config)) for name in have)
    modules, found = modules_of(family, model_config, bare), _Found(folder, config, options, have)
    for linear, names in modules.linears.items():
        found.linear(linear, names)
    for linear, rows in modules.own.items():
        found.own_modules(linear, rows)
    for stack, names in modules.experts.items():
        num_experts = next(b.experts.num_experts for b, _ in model_config.blocks if b.experts)
        found.experts(stack, names, num_experts, split=f"{stack}.gate_proj" in modules.own)
    for name, (weight, _) in naming.hf_names(family.weights(model_config)).items():
        if weight.ours.startswith("task_head.") and PREFIX + name in have:
            value = have.pop(PREFIX + name)
            found.arrays[weight.ours] = np.ascontiguousarray(value.T if weight.transpose else value)
    if have:
        raise UserError(
            f"{folder} has the tensor {sorted(have)[0]!r}, which fits no linear layer of this model ({len(have)} in all)"
        )
    if not found.ranks:
        raise UserError(f"{folder}/adapter_model.safetensors holds no LoRA tensors")
    found.check_whole()
    targets = "|".join(sorted(found.ranks)).replace(".", r"\.")
    return options._replace(
        targets=targets,
        rank_pattern=tuple((p, r) for p, r in found.ranks.items() if r != options.rank),
        alpha_pattern=tuple((p, a) for p, a in found.alphas.items() if a != options.alpha),
    ), found.arrays


class _Found:
    """What an adapter's tensors hold, by our paths; a tensor that has its place is taken out of `have`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], options: Options, have: dict[str, np.ndarray]):
        self.folder, self.config, self.options, self.have = folder, config, options, have
        self.arrays: dict[str, np.ndarray] = {}
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}

    def linear(self, linear: str, modules: list[str]) -> None:
        """A linear layer: one module per layer, or one in all."""
        for kind, suffix in SUFFIX.items():
            parts = self._taken(linear, modules, suffix)
            if not parts:
                continue
            stacked = np.stack([part.T for part in parts]) if linear.startswith("layers.") else parts[0].T
            self.arrays[f"{linear}{ADAPTER}{kind}"] = np.ascontiguousarray(stacked)
            if kind == "lora_a":
                for module in modules:  # under an adapted output head PEFT stores the frozen weight along: a copy
                    self.have.pop(f"{PREFIX}{module}.base_layer.weight", None)
                self.ranks[linear], self.alphas[linear] = stacked.shape[-1], self._alpha(linear, modules)

    def own_modules(self, linear: str, rows: list[list[str]]) -> None:
        """A linear of experts, each expert's a module of its own (as under transformers 4)."""
        a, b = self._pair(linear, [module for row in rows for module in row])
        if a:
            shape = (len(rows), len(rows[0]))
            A, B = (np.stack([part.T for part in parts]).reshape(*shape, *parts[0].T.shape) for parts in (a, b))
            self._add(linear, Factors(A, B, self.options.scale_of(self._alpha(linear, sum(rows, [])), A.shape[-1])))

    def experts(self, stack: str, modules: list[str], num_experts: int, split: bool) -> None:
        """All experts of a layer in one module, adapted by its parameters; `split`: here gate and up are two."""
        inner = any(f"{PREFIX}{module}{INNER}.lora_A.weight" in self.have for module in modules)
        wanted = self.config.get("target_parameters") or ()
        for depth, parameter in enumerate(reversed(peft_experts.PARAMETERS)):
            full = f"{modules[0]}.{parameter}"
            if not inner and not any(full == name or full.endswith(f".{name}") for name in wanted):
                continue
            path = f"{stack}.{parameter}"
            wrapped = [f"{module}{INNER * depth * inner}" for module in modules]
            a, b = self._pair(path, wrapped)
            if not a:
                continue
            rank = int(self._by_pattern("rank_pattern", full, self.options.rank))
            if a[0].shape[0] != num_experts * rank or b[0].shape[1] != num_experts * rank:
                raise UserError(
                    f"{self.folder} has {full}.lora_A of shape {a[0].shape}; {num_experts} experts of rank {rank} make "
                    f"{num_experts * rank} rows: was the adapter made for another model?"
                )
            pairs = [peft_experts.read(*pair, num_experts) for pair in zip(a, b, strict=True)]
            alpha = self._alpha(path, [f"{module}.{parameter}" for module in modules])
            scale = self.options.scale_of(alpha, rank)
            both = Factors(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]), scale)
            parts = peft_experts.apart(both) if split and parameter == "gate_up_proj" else {parameter: both}
            for name, factors in parts.items():
                self._add(f"{stack}.{name}", factors)

    def _add(self, linear: str, factors: Factors) -> None:
        self.arrays[f"{linear}{ADAPTER}lora_a"] = np.ascontiguousarray(factors.a)
        self.arrays[f"{linear}{ADAPTER}lora_b"] = np.ascontiguousarray(factors.b)
        self.ranks[linear], self.alphas[linear] = factors.rank, self.options.alpha_of(factors.scale, factors.rank)

    def check_whole(self) -> None:
        """Refuses a linear of which a tensor is missing, or one too many."""
        kinds = [kind for kind in SUFFIX if kind != "magnitude" or self.options.use_dora]
        for linear in sorted({path.split(ADAPTER)[0] for path in self.arrays if ADAPTER in path}):
            found = [kind for kind in SUFFIX if f"{linear}{ADAPTER}{kind}" in self.arrays]
            if found != kinds:
                names = [" and ".join(SUFFIX[kind] for kind in some) for some in (found, kinds)]
                raise UserError(
                    f"{self.folder} has {names[0]} for {linear}; expected {names[1]} (use_dora={self.options.use_dora}): save it "
                    "again"
                )

    def _by_pattern(self, pattern: str, module: str, default: float) -> float:
        """PEFT's rule: a key of the pattern is a regex that matches the end of a module's name."""
        items = (self.config.get(pattern) or {}).items()
        return float(next((value for key, value in items if re.match(rf"(.*\.)?({key})$", module)), default))

    def _alpha(self, linear: str, modules: list[str]) -> float:
        """The one alpha of a linear's layers."""
        found = sorted({self._by_pattern("alpha_pattern", module, self.options.alpha) for module in modules})
        if len(found) > 1:
            raise UserError(
                f"{self.folder} gives {linear} different alphas in different layers: {found}; merge it with PEFT first"
            )
        return found[0]

    def _pair(self, linear: str, modules: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        a, b = (self._taken(linear, modules, SUFFIX[kind]) for kind in ("lora_a", "lora_b"))
        if len(a) != len(b):
            raise UserError(f"{self.folder} has only one of lora_A and lora_B for {linear}: the file is not whole")
        return a, b

    def _taken(self, linear: str, modules: list[str], suffix: str) -> list[np.ndarray]:
        """The tensors of all modules, taken out; none where the first has none and no other."""
        names = [f"{PREFIX}{module}.{suffix}" for module in modules]
        missing = [name for name in names if name not in self.have]
        if len(missing) == len(names):
            return []
        layers = self.options.layers
        left_out = {f"{PREFIX}{m}.{suffix}" for m in modules if layers and layer_of(m) not in layers}
        if set(missing) - left_out or (missing and suffix == SUFFIX["magnitude"]):
            raise UserError(
                f"{self.folder} adapts {linear} in some layers only: {missing[0]} is missing; jaxtune adapts all layers alike, or without "
                "DoRA those of layers_to_transform"
            )
        like = self.have[next(name for name in names if name in self.have)]
        parts = [np.zeros_like(like) if name in missing else self.have.pop(name) for name in names]
        if len({part.shape for part in parts}) > 1:
            raise UserError(
                f"{self.folder} gives {linear} different ranks in different layers: {sorted({p.T.shape for p in parts})}"
            )
        return parts
