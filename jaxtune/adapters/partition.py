"""One labels tree says what trains: it drives the split, the optimizer's groups and the export.

Parameters are a flat dictionary, dotted path -> array. Labels: "lora_a", "lora_b", "magnitude" (DoRA), "prompt" (virtual
tokens), "full", "frozen".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxtune.types import UserError

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
