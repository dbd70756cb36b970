"""PEFT adapter folders, read and written: the format that PyTorch users load unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune import sharding
from jaxtune.adapters.lora import Options
from jaxtune.models import naming
from jaxtune.types import UserError
from jaxtune.weights import peft_experts, peft_modules
from jaxtune.weights.peft_experts import Factors
from jaxtune.weights.peft_modules import Modules, renamed

_PREFIX = "base_model.model."
_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_ADAPTER, _INNER = ".adapter.", ".base_layer"


def check(family: ModuleType, model_config: Any, linears: Iterable[str], options: Options) -> None:
    """Refuses an adapter that PEFT has no form for.

    Raises:
      UserError: DoRA on what PEFT adapts as a parameter of a module, naming the first and what to do.
    """
    modules = peft_modules.modules(family, model_config)
    found = [path for path in linears if path in modules.by_weight or path.rpartition(".")[0] in modules.experts]
    if options.use_dora and found:
        raise UserError(
            f"tune.use_dora on {found[0]}: PEFT has no DoRA on experts, routers and the MLPs beside them, so there is no adapter "
            f"folder to write: set export.merge=True, or tune.use_dora=False, or narrow tune.targets (attention: '.*attn.*')"
        )


def save(
    folder: Path,
    family: ModuleType,
    model_config: Any,
    adapter: Mapping[str, Any],
    options: Options,
    base: str,
    write: bool = True,
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md`; in `hf.new_folder`, whole or not at all.

    `adapter` maps our paths ("….adapter.lora_a") to arrays; `base` is what the reader should load the adapter onto.

    Raises:
      UserError: as `check`.
    """
    from safetensors.numpy import save_file

    modules = peft_modules.modules(family, model_config)
    tensors: dict[str, np.ndarray] = {}
    head = {path: array for path, array in adapter.items() if _ADAPTER not in path}
    saved = {}  # of a task head, which PEFT keeps whole beside the adapter
    for name, (weight, _) in naming.hf_names(family.weights(model_config)).items():
        if weight.ours in head:
            value = sharding.to_host(head[weight.ours])
            saved[name] = np.ascontiguousarray(value.T if weight.transpose else value)
    tensors |= {f"{_PREFIX}{name}": value for name, value in saved.items()}
    hosts = {path: sharding.to_host(array) for path, array in adapter.items() if path not in head}
    chosen = {path.split(_ADAPTER)[0] for path in hosts}
    check(family, model_config, sorted(chosen), options)
    for path, host in hosts.items():
        linear, kind = path.split(_ADAPTER)
        for layer, module in enumerate(modules.linears.get(linear, ())):
            value = host[layer] if linear.startswith("layers.") else host
            tensors[f"{_PREFIX}{module}.{_SUFFIX[kind]}"] = np.ascontiguousarray(value.T)
    names, parameters = _targets(modules, chosen), _weights_of(modules, chosen)
    fused = _fused(modules, hosts, options)
    for (stack, parameter), (factors, depth) in fused.items():
        for layer, module in enumerate(modules.experts[stack]):
            parameters.append(f"{module}.{parameter}")
            for suffix, value in peft_experts.stored(factors.a[layer], factors.b[layer]).items():
                tensors[f"{_PREFIX}{module}{_INNER * depth}.{suffix}"] = value
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    task = "CAUSAL_LM"
    if model_config.head is not None:
        task = "SEQ_CLS" if model_config.head.pool else "FEATURE_EXTRACTION" if model_config.head.tied else "TOKEN_CLS"
    whole = {"task_type": task, "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in saved}) or None}
    config = json.dumps(_config(options, names, parameters, modules, fused, base) | whole, indent=2)
    (folder / "adapter_config.json").write_text(config + "\n")
    (folder / "README.md").write_text(_card(base, options, names + parameters))


def _targets(modules: Modules, chosen: set[str]) -> list[str]:
    """The short names ("q_proj") where they say exactly what was chosen; else the full module names.

    With experts a short name says too much: PEFT takes "gate_proj" for those of the experts as well.
    """
    linears = modules.linears
    short = {linear.rsplit(".", 1)[-1] for linear in chosen}
    if not modules.experts and {linear for linear in linears if linear.rsplit(".", 1)[-1] in short} == chosen:
        return sorted({module.rsplit(".", 1)[-1] for linear in chosen for module in linears[linear]})
    return sorted(module for linear in chosen - modules.by_weight for module in linears.get(linear, ()))


def _weights_of(modules: Modules, chosen: set[str]) -> list[str]:
    """What PEFT reaches only by its weight's name."""
    return sorted(f"{module}.weight" for linear in chosen & modules.by_weight for module in modules.linears[linear])


_Fused = dict[tuple[str, str], tuple[Factors, int]]


def _fused(modules: Modules, hosts: Mapping[str, np.ndarray], options: Options) -> _Fused:
    """(our path of experts, PEFT's parameter) -> (its factors, the wrappers around its own)."""
    found: _Fused = {}
    for stack in modules.experts:
        parts = {}
        for name in ("gate_proj", "up_proj", *peft_experts.PARAMETERS):
            a, b = (hosts.get(f"{stack}.{name}{_ADAPTER}{kind}") for kind in ("lora_a", "lora_b"))
            if a is not None and b is not None:
                parts[name] = Factors(a, b, options.scale(f"{stack}.{name}"))
        wrapped = peft_experts.fused(parts)
        for depth, (parameter, factors) in enumerate(reversed(wrapped.items())):
            found[stack, parameter] = (factors, depth)
    return found


def _config(
    options: Options, targets: list[str], parameters: list[str], modules: Modules, fused: _Fused, base: str
) -> dict[str, Any]:
    def per_module(pattern: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return {module: value for path, value in pattern for module in modules.linears.get(path, ())}

    ranks, alphas = per_module(options.rank_pattern), per_module(options.alpha_pattern)
    for (stack, parameter), (factors, _) in fused.items():
        names = [f"{module}.{parameter}" for module in modules.experts[stack]]
        alpha = options.alpha_of(factors.scale, factors.rank)
        ranks |= dict.fromkeys(names, factors.rank) if factors.rank != options.rank else {}
        alphas |= dict.fromkeys(names, alpha) if alpha != options.alpha else {}
    return {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": options.rank, "lora_alpha": options.alpha,
        "lora_dropout": 0.0 if parameters else options.dropout,  # PEFT refuses any beside target_parameters
        "bias": "none", "use_rslora": options.use_rslora, "use_dora": options.use_dora, "target_modules": targets,
        **({"target_parameters": parameters} if parameters else {}), "rank_pattern": ranks, "alpha_pattern": alphas,
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip


def _card(base: str, options: Options, targets: list[str]) -> str:
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [lora, jaxtune]
---
# LoRA adapter

Trained by jaxtune on `{base}`: rank {options.rank}, alpha {options.alpha:g}, on {", ".join(targets[:12])}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE_MODEL_FOLDER)
model = PeftModel.from_pretrained(base, THIS_FOLDER)
```
"""


# PEFT settings that change the adapter's maths and are not read here, with the value at which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "modules_to_save": (None, []), "layers_to_transform": (None, []), "fan_in_fan_out": (None, False),
    "lora_bias": (None, False), "trainable_token_indices": (None, [], {}), "layer_replication": (None, []), "use_qalora": (None, False), "alora_invocation_tokens": (None, []), "use_bdlora": (None, False),
    "arrow_config": (None,), "exclude_modules": (None, []),
}  # fmt: skip


def read_config(folder: Path, tune_dtype: str = "float32") -> tuple[dict[str, Any], Options]:
    """Reads `adapter_config.json`: (as it stands, our options with the targets still unresolved).

    Raises:
      UserError: it is no LoRA adapter folder, or uses a PEFT setting that jaxtune does not read.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a PEFT adapter folder: expected adapter_config.json")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; expected an object")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file} has peft_type={config.get('peft_type')!r}; jaxtune reads 'LORA'")
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise UserError(
                f"{file} has {name}={config[name]!r}, which jaxtune does not read; merge that adapter with PEFT first"
            )
    for names in (("r",), ("target_modules", "target_parameters")):
        if not any(config.get(name) for name in names):
            raise UserError(f"{file} lacks {names[0]!r}")
    for name in ("r", "lora_alpha", "lora_dropout"):
        if not isinstance(config.get(name, 0), int | float | None):
            raise UserError(f"{file} has {name}={config[name]!r}; expected a number")
    options = Options(
        targets="", rank=int(config["r"]), alpha=float(config.get("lora_alpha") or 8), dropout=float(config.get("lora_dropout") or 0),
        use_rslora=bool(config.get("use_rslora")), use_dora=bool(config.get("use_dora")), dtype=jnp.dtype(tune_dtype),
    )  # fmt: skip
    return config, options


def load(
    folder: Path, family: ModuleType, model_config: Any, tune_dtype: str = "float32"
) -> tuple[Options, dict[str, np.ndarray]]:
    """Returns (options whose `targets` names exactly the adapted linears, our path -> host array, layers stacked).

    Raises:
      UserError: a tensor of a layer is missing, belongs to no linear of this model, or ranks differ between layers.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config, options = read_config(folder, tune_dtype)
    try:
        have = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/adapter_model.safetensors cannot be read ({error})") from None
    have = {renamed(name): tensor for name, tensor in have.items()}
    modules, found = peft_modules.modules(family, model_config), _Found(folder, config, options, have)
    for linear, names in modules.linears.items():
        found.linear(linear, names)
    for linear, rows in modules.own.items():
        found.own_modules(linear, rows)
    for stack, names in modules.experts.items():
        num_experts = next(b.experts.num_experts for b, _ in model_config.blocks if b.experts)
        found.experts(stack, names, num_experts, split=f"{stack}.gate_proj" in modules.own)
    if have:
        raise UserError(
            f"{folder} has the tensor {sorted(have)[0]!r}, which fits no linear layer of this model ({len(have)} in all)"
        )
    if not found.ranks:
        raise UserError(f"{folder}/adapter_model.safetensors holds no LoRA tensors")
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
        for kind, suffix in _SUFFIX.items():
            parts = self._taken(linear, modules, suffix)
            if not parts:
                continue
            stacked = np.stack([part.T for part in parts]) if linear.startswith("layers.") else parts[0].T
            self.arrays[f"{linear}{_ADAPTER}{kind}"] = np.ascontiguousarray(stacked)
            if kind == "lora_a":
                for module in modules:  # under an adapted output head PEFT stores the frozen weight along: a copy
                    self.have.pop(f"{_PREFIX}{module}.base_layer.weight", None)
                self.ranks[linear], self.alphas[linear] = stacked.shape[-1], self._alpha(modules[0])

    def own_modules(self, linear: str, rows: list[list[str]]) -> None:
        """A linear of experts, each expert's a module of its own (as under transformers 4)."""
        a, b = self._pair(linear, [module for row in rows for module in row])
        if a:
            shape = (len(rows), len(rows[0]))
            A, B = (np.stack([part.T for part in parts]).reshape(*shape, *parts[0].T.shape) for parts in (a, b))
            self._add(linear, Factors(A, B, self.options.scale_of(self._alpha(rows[0][0]), A.shape[-1])))

    def experts(self, stack: str, modules: list[str], num_experts: int, split: bool) -> None:
        """All experts of a layer in one module, adapted by its parameters; `split`: here gate and up are two."""
        inner = any(f"{_PREFIX}{module}{_INNER}.lora_A.weight" in self.have for module in modules)
        wanted = self.config.get("target_parameters") or ()
        for depth, parameter in enumerate(reversed(peft_experts.PARAMETERS)):
            full = f"{modules[0]}.{parameter}"
            if not inner and not any(full == name or full.endswith(f".{name}") for name in wanted):
                continue
            path = f"{stack}.{parameter}"
            wrapped = [f"{module}{_INNER * depth * inner}" for module in modules]
            a, b = self._pair(path, wrapped)
            if not a:
                continue
            rank = int(_pattern(self.config.get("rank_pattern"), full, self.options.rank))
            if a[0].shape[0] != num_experts * rank or b[0].shape[1] != num_experts * rank:
                raise UserError(
                    f"{self.folder} has {full}.lora_A of shape {a[0].shape}; {num_experts} experts of rank {rank} make "
                    f"{num_experts * rank} rows: was the adapter made for another model?"
                )
            pairs = [peft_experts.read(*pair, num_experts) for pair in zip(a, b, strict=True)]
            scale = self.options.scale_of(self._alpha(full), rank)
            both = Factors(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]), scale)
            parts = peft_experts.apart(both) if split and parameter == "gate_up_proj" else {parameter: both}
            for name, factors in parts.items():
                self._add(f"{stack}.{name}", factors)

    def _add(self, linear: str, factors: Factors) -> None:
        self.arrays[f"{linear}{_ADAPTER}lora_a"] = np.ascontiguousarray(factors.a)
        self.arrays[f"{linear}{_ADAPTER}lora_b"] = np.ascontiguousarray(factors.b)
        self.ranks[linear], self.alphas[linear] = factors.rank, self.options.alpha_of(factors.scale, factors.rank)

    def _alpha(self, module: str) -> float:
        return float(_pattern(self.config.get("alpha_pattern"), module, self.options.alpha))

    def _pair(self, linear: str, modules: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        a, b = (self._taken(linear, modules, _SUFFIX[kind]) for kind in ("lora_a", "lora_b"))
        if len(a) != len(b):
            raise UserError(f"{self.folder} has only one of lora_A and lora_B for {linear}: the file is not whole")
        return a, b

    def _taken(self, linear: str, modules: list[str], suffix: str) -> list[np.ndarray]:
        """The tensors of all modules, taken out; none where the first has none and no other."""
        names = [f"{_PREFIX}{module}.{suffix}" for module in modules]
        missing = [name for name in names if name not in self.have]
        if len(missing) == len(names):
            return []
        if missing:
            raise UserError(
                f"{self.folder} adapts {linear} in some layers only: {missing[0]} is missing; jaxtune adapts all layers alike"
            )
        parts = [self.have.pop(name) for name in names]
        if len({part.shape for part in parts}) > 1:
            raise UserError(
                f"{self.folder} gives {linear} different ranks in different layers: {sorted({p.T.shape for p in parts})}"
            )
        return parts


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key of the pattern is a regex that matches the end of the module's name."""
    import re

    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
