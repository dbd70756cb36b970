"""PEFT adapter folders, written: the format that PyTorch users load unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxtune import sharding
from jaxtune.adapters.lora import Options
from jaxtune.models import naming
from jaxtune.models.spec import Head
from jaxtune.types import UserError
from jaxtune.weights import peft_experts
from jaxtune.weights.peft_experts import Factors
from jaxtune.weights.peft_names import ADAPTER, INNER, PREFIX, SUFFIX, Modules, layer_of, modules_of


def check(family: ModuleType, model_config: Any, linears: Iterable[str], options: Options) -> None:
    """Refuses an adapter that PEFT has no form for.

    Raises:
      UserError: DoRA, or some layers only, on what PEFT adapts as a parameter of a module, naming the first and what to do.
    """
    modules = modules_of(family, model_config)
    found = [path for path in linears if path in modules.by_weight or path.rpartition(".")[0] in modules.experts]
    if options.use_dora and found:
        raise UserError(
            f"tune.use_dora on {found[0]}: PEFT has no DoRA on experts, routers and the MLPs beside them, so there is no adapter "
            f"folder to write: set export.merge=True, or tune.use_dora=False, or narrow tune.targets (attention: '.*attn.*')"
        )
    if options.layers and found:
        raise UserError(
            f"tune.train_layers={options.layers} with an adapter on {found[0]}: PEFT leaves no layer out of experts, routers and the MLPs "
            "beside them, so there is no adapter folder to write: set export.merge=True, or narrow tune.targets (attention: '.*attn.*')"
        )


def save(
    folder: Path,
    family: ModuleType,
    model_config: Any,
    adapter: Mapping[str, Any],
    options: Options,
    base: str,
    write: bool = True,
    labels: Sequence[str] = (),
    auto_class: str = "AutoModelForCausalLM",
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md`; in `hf.new_folder`, whole or not at all.

    `adapter` maps our paths ("….adapter.lora_a", and a trained head's) to arrays; `base` is what the reader should load the
    adapter onto, by `auto_class`; `labels` are the head's.

    Raises:
      UserError: as `check`.
    """
    from safetensors.numpy import save_file

    bare = auto_class == "AutoModel"
    modules, tensors = modules_of(family, model_config, bare), dict[str, np.ndarray]()
    head = {path: array for path, array in adapter.items() if ADAPTER not in path}
    saved = {}  # of a task head, which PEFT keeps whole beside the adapter
    for name, (weight, _) in naming.hf_names(family.weights(model_config)).items():
        if weight.ours in head:
            value = sharding.to_host(head[weight.ours])
            saved[name] = np.ascontiguousarray(value.T if weight.transpose else value)
    tensors |= {f"{PREFIX}{name}": value for name, value in saved.items()}
    hosts = {path: sharding.to_host(array) for path, array in adapter.items() if path not in head}
    chosen = {path.split(ADAPTER)[0] for path in hosts}
    check(family, model_config, sorted(chosen), options)
    for path, host in hosts.items():
        linear, kind = path.split(ADAPTER)
        for layer, module in enumerate(modules.linears.get(linear, ())):
            if not _adapted(module, options):
                continue
            value = host[layer] if linear.startswith("layers.") else host
            tensors[f"{PREFIX}{module}.{SUFFIX[kind]}"] = np.ascontiguousarray(value.T)
    # PEFT looks for `layers_to_transform` in all that a short name says, and an output head is in none of them.
    exact = bare or bool(options.layers and any(not linear.startswith("layers.") for linear in chosen))
    names = [name for name in _targets(modules, chosen, exact) if _adapted(name, options)]
    parameters = _weights_of(modules, chosen)
    fused = _fused(modules, hosts, options)
    for (stack, parameter), (factors, depth) in fused.items():
        for layer, module in enumerate(modules.experts[stack]):
            parameters.append(f"{module}.{parameter}")
            for suffix, value in peft_experts.stored(factors.a[layer], factors.b[layer]).items():
                tensors[f"{PREFIX}{module}{INNER * depth}.{suffix}"] = value
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = {
        "task_type": "FEATURE_EXTRACTION" if bare else _task(model_config.head),
        "modules_to_save": _saved_modules(saved),
    }
    config = json.dumps(_config(options, names, parameters, modules, fused, base) | whole, indent=2)
    (folder / "adapter_config.json").write_text(config + "\n")
    (folder / "README.md").write_text(_card(base, options, names + parameters, labels, auto_class))


def _adapted(module: str, options: Options) -> bool:
    """Whether a module is in one of the layers that the adapter is on, or in none: such as an output head, or a short name."""
    layer = layer_of(module)
    return not options.layers or layer is None or layer in options.layers


def _task(head: Head | None) -> str | None:
    """PEFT's name for what the model does; it has none for guessing masked words."""
    if head is None:
        return "CAUSAL_LM"
    if head.tied:
        return None
    return "FEATURE_EXTRACTION" if head.bare else "SEQ_CLS" if head.pool else "TOKEN_CLS"


def _saved_modules(saved: Iterable[str]) -> list[str] | None:
    """The modules of a head's tensors. PEFT itself saves "classifier" whole, and cannot save a part of it once more."""
    modules = {name.rsplit(".", 1)[0] for name in saved}
    return sorted({"classifier" if name.startswith("classifier.") else name for name in modules}) or None


def _targets(modules: Modules, chosen: set[str], exact: bool) -> list[str]:
    """The short names ("q_proj") where they say exactly what was chosen; else, or with `exact`, the full module names.

    With experts a short name says too much: PEFT takes "gate_proj" for those of the experts as well. So it does of an
    encoder without a head, whose pooler is a "dense" too.
    """
    linears = modules.linears
    short = {linear.rsplit(".", 1)[-1] for linear in chosen}
    if (
        not exact
        and not modules.experts
        and {linear for linear in linears if linear.rsplit(".", 1)[-1] in short} == chosen
    ):
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
            a, b = (hosts.get(f"{stack}.{name}{ADAPTER}{kind}") for kind in ("lora_a", "lora_b"))
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
        **({"layers_to_transform": list(options.layers)} if options.layers else {}), "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip


def _card(base: str, options: Options, targets: list[str], labels: Sequence[str], auto_class: str) -> str:
    numbered = ", ".join(f"{i} = {name}" for i, name in enumerate(labels))
    scores = f"\nThe head is saved beside it; its scores are, in order: {numbered}.\n" if labels else ""
    count = f", num_labels={len(labels)}" if labels else ""
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [lora, jaxtune]
---
# LoRA adapter

Trained by jaxtune on `{base}`: rank {options.rank}, alpha {options.alpha:g}, on {", ".join(targets[:12])}.
{scores}
```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained(BASE_MODEL_FOLDER{count})
model = PeftModel.from_pretrained(base, THIS_FOLDER)
```
"""
