"""Which of transformers' modules, as PEFT names them, hold what jaxtune has at a path; used to write adapters and to read them."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any, NamedTuple

from jaxtune.models import naming

PREFIX = "base_model.model."
SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
KERNEL, ADAPTER, INNER = ".kernel", ".adapter.", ".base_layer"


class Modules(NamedTuple):
    """Where transformers has what we have: our path -> its modules' names, one per layer.

    linears    each linear layer but those of experts
    experts    each "….experts": the module of a layer's experts
    own        each linear of experts, where transformers 4 has a module for every expert: per layer, names of all of them
    by_weight  the linears that PEFT reaches only by their weight's name (`target_parameters`): routers, which are no linear
               modules there, and those whose name ends like an expert's in the files, for PEFT takes it for all experts'
    """

    linears: dict[str, list[str]]
    experts: dict[str, list[str]]
    own: dict[str, list[list[str]]]
    by_weight: frozenset[str]


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in, as PEFT's `layers_to_transform` counts; None outside of them."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", f"base.{module}")
    return int(found.group(1)) if found else None


def root(family: ModuleType, model_config: Any) -> str:
    """What the names of a model under a head begin with, and those of one without do not: "model." of "model.layers.0"."""
    table = next(weight.hf for weight in family.weights(model_config) if weight.ours == "embed.table")
    return table.split(".")[0] + "."


def modules_of(family: ModuleType, model_config: Any, bare: bool = False) -> Modules:
    """The modules of a family's model; `bare`, of one without a head (AutoModel)."""
    under = root(family, model_config) if bare else ""
    linears: dict[str, list[str]] = {}
    experts: dict[str, list[str]] = {}
    own: dict[str, list[list[str]]] = {}
    for name, (weight, place) in naming.hf_names(family.weights(model_config)).items():
        path, module = weight.ours.removesuffix(KERNEL), renamed(name).removesuffix(".weight").removeprefix(under)
        if path == weight.ours:
            continue
        stack, _, _ = path.rpartition(".")
        if not stack.endswith(".experts"):
            linears.setdefault(path, []).append(module)
            continue
        layers = experts.setdefault(stack, [])
        layer = module.rsplit(".", 2 if weight.experts else 1)[0]
        if layer not in layers:
            layers.append(layer)
        if weight.experts:
            rows = own.setdefault(path, [])
            rows += [[]] if place[1] == 0 else []
            rows[-1].append(module)
    endings = {names[0][0].rsplit(".", 1)[-1] for names in own.values()}
    by_weight = {p for p, m in linears.items() if p.endswith(".router") or m[0].rsplit(".", 1)[-1] in endings}
    return Modules(linears, experts, own, frozenset(by_weight))


def renamed(name: str) -> str:
    """A name in files as transformers 5 has it in models."""
    return name.replace(".block_sparse_moe.", ".mlp.")
