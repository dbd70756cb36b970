"""A student made of some of a model's layers: `model.keep_layers`."""

from __future__ import annotations

import re
from typing import Any

from jaxtune import registry
from jaxtune.models import FAMILIES
from jaxtune.types import UserError
from jaxtune.weights import hf

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what families call the number of layers
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a tensor's name the first number; an expert's comes later


def config(hf_config: dict[str, Any], keep: tuple[int, ...]) -> dict[str, Any]:
    """The config of a model that has the layers `keep` alone: their number, and each list with an entry for each layer.

    Raises:
      UserError: there is no such layer, or the config would make a layer that is kept another than it is.
    """
    (name,) = [name for name in _COUNTS if name in hf_config][:1] or [_COUNTS[0]]
    number = int(hf_config.get(name) or 0)
    if keep[-1] >= number:
        raise UserError(f"model.keep_layers has {keep[-1]}, and the model has {number} layers, 0 to {number - 1}")

    def cut(value: Any) -> Any:
        return [value[at] for at in keep] if isinstance(value, list) and len(value) == number else value

    made = {key: cut(value) for key, value in hf_config.items()} | {name: len(keep)}
    family = registry.load("model_type", str(hf_config.get("model_type")), FAMILIES)
    whole, student = _layers(family.from_hf(hf_config)), _layers(family.from_hf(made))
    changed = next((old for new, old in enumerate(keep) if student[new] != whole[old]), None)
    if changed is not None:
        raise UserError(
            f"model.keep_layers={keep} leaves layer {changed} where config.json would make it another (this model's layers differ by "
            "their number): keep layers so that each stands where one of its kind would, such as whole rounds of the pattern"
        )
    return made


def _layers(c: Any) -> list[Any]:
    """What each layer is: its block, window and rope."""
    blocks = {number: block for block, numbers in c.blocks for number in numbers}
    return [
        (blocks[at], c.windows[at] if c.windows else 0, c.rope_of[at] if c.rope_of else 0) for at in range(c.num_layers)
    ]


def tensors(source: hf.Source, keep: tuple[int, ...]) -> hf.Source:
    """The source with the layers `keep` alone, numbered anew."""
    place = {str(old): str(new) for new, old in enumerate(keep)}
    names = {}
    for name in source.names():
        found = _LAYER.search(name)
        if found is None:
            names[name] = name
        elif found[0] in place:
            names[_LAYER.sub(place[found[0]], name, count=1)] = name
    return hf.Renamed(source, names)
