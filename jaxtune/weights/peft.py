"""PEFT adapter folders, read and written: the format that PyTorch users load unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune import sharding
from jaxtune.adapters.lora import Options
from jaxtune.models import naming
from jaxtune.types import UserError

_PREFIX = "base_model.model."
_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_KERNEL, _ADAPTER = ".kernel", ".adapter."


def _modules(family: ModuleType, model_config: Any) -> dict[str, list[str]]:
    """Our linear path -> its Hugging Face module names, one per layer."""
    found: dict[str, list[str]] = {}
    for name, (weight, place) in naming.hf_names(family.weights(model_config)).items():
        if weight.ours.endswith(_KERNEL) and len(place) < 2 and name.endswith(".weight"):
            found.setdefault(weight.ours.removesuffix(_KERNEL), []).append(name.removesuffix(".weight"))
    return found


def _bare(module: str, family: ModuleType, model_config: Any) -> str:
    """A module's name in the model without a head: "layers.0.mlp" of "model.layers.0.mlp"."""
    table = next(weight.hf for weight in family.weights(model_config) if weight.ours == "embed.table")
    return module.removeprefix(table.split(".")[0] + ".")


def save(
    folder: Path,
    family: ModuleType,
    model_config: Any,
    adapter: Mapping[str, Any],
    options: Options,
    base: str,
    write: bool = True,
    embeds: bool = False,
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md`; in `hf.new_folder`, whole or not at all.

    `adapter` maps our paths ("….adapter.lora_a") to arrays; `base` is what the reader should load the adapter onto. With
    `embeds` that is the model without a head (AutoModel), whose names lack the first part of those under a head.
    """
    from safetensors.numpy import save_file

    modules, targets = _modules(family, model_config), set()
    if embeds:
        modules = {linear: [_bare(name, family, model_config) for name in names] for linear, names in modules.items()}
    tensors: dict[str, np.ndarray] = {}
    head = {path: array for path, array in adapter.items() if _ADAPTER not in path}
    saved = {}  # of a task head, which PEFT keeps whole beside the adapter
    for name, (weight, _) in naming.hf_names(family.weights(model_config)).items():
        if weight.ours in head:
            value = sharding.to_host(head[weight.ours])
            saved[name] = np.ascontiguousarray(value.T if weight.transpose else value)
    tensors |= {f"{_PREFIX}{name}": value for name, value in saved.items()}
    for path, array in adapter.items():
        if path in head:
            continue
        linear, kind = path.split(_ADAPTER)
        host, stacked = sharding.to_host(array), linear.startswith("layers.")
        targets.add(linear)
        for layer, module in enumerate(modules[linear]):
            value = host[layer] if stacked else host
            tensors[f"{_PREFIX}{module}.{_SUFFIX[kind]}"] = np.ascontiguousarray(value.T)
    if not write:
        return
    has_experts = any(weight.experts for weight in family.weights(model_config))
    names = _targets(modules, targets, exact=has_experts or embeds)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    task = "FEATURE_EXTRACTION" if embeds else "CAUSAL_LM"
    if model_config.head is not None and not embeds:
        task = "SEQ_CLS" if model_config.head.pool else "FEATURE_EXTRACTION" if model_config.head.tied else "TOKEN_CLS"
    whole = {"task_type": task, "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in saved}) or None}
    config = json.dumps(_config(options, names, modules, base) | whole, indent=2)
    (folder / "adapter_config.json").write_text(config + "\n")
    (folder / "README.md").write_text(_card(base, options, names, "AutoModel" if embeds else "AutoModelForCausalLM"))


def _targets(modules: dict[str, list[str]], chosen: set[str], exact: bool) -> list[str]:
    """The short names ("q_proj") where they say exactly what was chosen; else the full module names.

    With experts a short name says too much: PEFT takes "gate_proj" for those of the experts as well. So it does of an
    encoder without a head, whose pooler is a "dense" too.
    """
    short = {linear.rsplit(".", 1)[-1] for linear in chosen}
    if not exact and {linear for linear in modules if linear.rsplit(".", 1)[-1] in short} == chosen:
        return sorted({module.rsplit(".", 1)[-1] for linear in chosen for module in modules[linear]})
    return sorted(module for linear in chosen for module in modules[linear])


def _config(options: Options, targets: list[str], modules: dict[str, list[str]], base: str) -> dict[str, Any]:
    def per_module(pattern: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return {module: value for path, value in pattern for module in modules[path]}

    return {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": options.rank,
        "lora_alpha": options.alpha, "lora_dropout": options.dropout, "bias": "none", "use_rslora": options.use_rslora,
        "use_dora": options.use_dora, "target_modules": targets, "rank_pattern": per_module(options.rank_pattern),
        "alpha_pattern": per_module(options.alpha_pattern), "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip


def _card(base: str, options: Options, targets: list[str], auto: str) -> str:
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [lora, jaxtune]
---
# LoRA adapter

Trained by jaxtune on `{base}`: rank {options.rank}, alpha {options.alpha:g}, on {", ".join(targets[:12])}.

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained(BASE_MODEL_FOLDER)
model = PeftModel.from_pretrained(base, THIS_FOLDER)
```
"""


# PEFT settings that change the adapter's maths and are not read here, with the value at which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "modules_to_save": (None, []), "layers_to_transform": (None, []), "fan_in_fan_out": (None, False),
    "lora_bias": (None, False), "trainable_token_indices": (None, [], {}), "target_parameters": (None, []),
    "layer_replication": (None, []), "use_qalora": (None, False), "alora_invocation_tokens": (None, []), "use_bdlora": (None, False),
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
    for name in ("r", "target_modules"):
        if not config.get(name):
            raise UserError(f"{file} lacks {name!r}")
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
    arrays: dict[str, np.ndarray] = {}
    ranks, alphas = {}, {}
    for linear, modules in _modules(family, model_config).items():
        bare = [_bare(module, family, model_config) for module in modules]
        modules = bare if any(name.startswith(f"{_PREFIX}{bare[0]}.") for name in have) else modules
        for kind, suffix in _SUFFIX.items():
            names = [f"{_PREFIX}{module}.{suffix}" for module in modules]
            if not any(name in have for name in names):
                continue
            missing = [name for name in names if name not in have]
            if missing:
                raise UserError(
                    f"{folder} adapts {linear} in some layers only: {missing[0]} is missing; jaxtune adapts all layers alike"
                )
            parts = [have.pop(name).T for name in names]
            if len({part.shape for part in parts}) > 1:
                raise UserError(
                    f"{folder} gives {linear} different ranks in different layers: {sorted({p.shape for p in parts})}"
                )
            stacked = np.stack(parts) if linear.startswith("layers.") else parts[0]
            arrays[f"{linear}{_ADAPTER}{kind}"] = np.ascontiguousarray(stacked)
            if kind == "lora_a":
                for module in modules:  # under an adapted output head PEFT stores the frozen weight along: a copy
                    have.pop(f"{_PREFIX}{module}.base_layer.weight", None)
                ranks[linear] = stacked.shape[-1]
                alphas[linear] = float(_pattern(config.get("alpha_pattern"), modules[0], options.alpha))
    if have:
        raise UserError(
            f"{folder} has the tensor {sorted(have)[0]!r}, which fits no linear layer of this model ({len(have)} in all)"
        )
    if not ranks:
        raise UserError(f"{folder}/adapter_model.safetensors holds no LoRA tensors")
    targets = "|".join(sorted(ranks)).replace(".", r"\.")
    return options._replace(
        targets=targets,
        rank_pattern=tuple((p, r) for p, r in ranks.items() if r != options.rank),
        alpha_pattern=tuple((p, a) for p, a in alphas.items() if a != options.alpha),
    ), arrays


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key of the pattern is a regex that matches the end of the module's name."""
    import re

    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
