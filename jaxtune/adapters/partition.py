"""One labels tree says what trains: it drives the split, the optimizer's groups and the export.

Parameters are a flat dictionary, dotted path -> array. Labels: "lora_a", "lora_b", "magnitude" (DoRA), "prompt" (virtual
tokens), "full", "frozen".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxtune.types import UserError, nearest

LoraLabels = ("lora_a", "lora_b", "magnitude")
HEAD_PATHS = ("lm_head.kernel", "lm_head.bias")
Leaf = TypeVar("Leaf")


def label(params: Mapping[str, Any], method: str, has_task: bool = False, headless: bool = False) -> dict[str, str]:
    """Labels every parameter for `method`: lora | full | head | prompt. `has_task`: the task head trains beside an adapter;
    `headless`: the objective reads no head, so none trains.

    Raises:
      UserError: "head" on a model whose head is its embedding table (training it would train the input side too), or
        with an objective that reads none.
    """

    def in_head(path: str) -> bool:
        return path in HEAD_PATHS or path.startswith("task_head.")

    if method == "head" and not any(in_head(path) for path in params):
        raise UserError("tune.method='head': this model's head is tied to its embedding table; use 'lora' or 'full'")

    if method == "head" and headless:
        raise UserError(
            "tune.method='head': train.objective reads no head, so nothing would train; use 'lora' or 'full'"
        )

    def one(path: str) -> str:
        kind = path.rsplit(".", 1)[-1]
        if ".adapter." in path:
            return kind
        if headless and in_head(path):
            return "frozen"
        # The bias over the vocabulary stays: PEFT keeps whole modules, and its module holds the embedding table too.
        with_adapter = has_task and path.startswith("task_head.") and path != "task_head.bias"
        is_new = path.startswith("value_head.")  # a critic's, of which no model has one
        return (
            "full" if method == "full" or (method == "head" and in_head(path)) or with_adapter or is_new else "frozen"
        )

    return {path: one(path) for path in params}


def split(params: Mapping[str, Leaf], labels: Mapping[str, str]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns (trainable, frozen)."""
    trainable = {path: value for path, value in params.items() if labels[path] != "frozen"}
    frozen = {path: value for path, value in params.items() if labels[path] == "frozen"}
    return trainable, frozen


def restricted(
    labels: Mapping[str, str], freeze: Sequence[str], layers: Sequence[int], num_layers: int, depths: Callable[[str], np.ndarray]
) -> dict[str, str]:  # fmt: skip
    """Labels with "frozen" for what a regex of `freeze` names, and for stacks without any of `layers` (none given: all train).

    Of a stack that has some, the others are frozen layer by layer: `optim.layers_of`. `depths` is `models.transformer`'s.

    Raises:
      UserError: a regex that names nothing, a layer that the model has not, or nothing is left to train.
    """
    for pattern in freeze:
        if not any(re.fullmatch(pattern, path) for path in labels):
            known = list(labels)
            raise UserError(
                f"tune.freeze has {pattern!r}, which matches no parameter{nearest(pattern, known) or '.'} A regex must match a whole path, "
                f"such as {known[0]!r}"
            )
    beyond = [number for number in layers if not 0 <= number < num_layers]
    if beyond:
        raise UserError(
            f"tune.train_layers has {beyond[0]}; this model's {num_layers} layers are 0 to {num_layers - 1}"
        )

    def one(path: str, name: str) -> str:
        named, numbers = any(re.fullmatch(pattern, path) for pattern in freeze), depths(path) - 1
        left_out = bool(layers) and numbers.ndim > 0 and not np.isin(numbers, np.asarray(layers)).any()
        return "frozen" if named or left_out else name

    found = {path: one(path, name) for path, name in labels.items()}
    if all(name == "frozen" for name in found.values()):
        raise UserError(
            f"tune.freeze={tuple(freeze)} and tune.train_layers={tuple(layers)} leave nothing to train: name less in the first, or more in "
            "the second"
        )
    return found
