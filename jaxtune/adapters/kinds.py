"""Which adapter a config asks for, and how it goes on a model: LoRA on linear layers, a soft prompt before the tokens."""

from __future__ import annotations

from typing import Any

import jax

from jaxtune.adapters import lora, prompt
from jaxtune.config import ConfigDict
from jaxtune.types import UserError

Options = lora.Options | prompt.Options


def from_config(tune: ConfigDict, given: Options | None = None, a_zero: bool = False) -> Options | None:
    """The options of `tune.method`, or those `given` in their place; None where it trains the model's own weights.

    `a_zero`: a new LoRA starts with A = 0.

    Raises:
      UserError: layers are to train that a given LoRA is not on.
    """
    if tune.method == "lora" and isinstance(given, lora.Options):
        lacking = sorted(set(tune.train_layers) - set(given.layers)) if given.layers else []
        if lacking:
            raise UserError(
                f"tune.train_layers has {lacking[0]}, where tune.adapter={tune.adapter!r} is not: it is on the layers {given.layers}"
            )
    if tune.method == "lora":
        return given or lora.Options.from_config(tune)._replace(zero="a" if a_zero else "b")
    return given or prompt.Options.from_config(tune) if tune.method == "prompt" else None


def attach(model: Any, options: Options | None) -> None:
    """Hangs the adapter on a model.

    Raises:
      UserError: as `lora.attach` or `prompt.attach`.
    """
    if isinstance(options, lora.Options):
        lora.attach(model, options)
    elif options is not None:
        prompt.attach(model, options)


def initial(
    soft: prompt.Options | None,
    path: str,
    like: jax.ShapeDtypeStruct,
    key: jax.Array,
    start: Any,
    scale: float,
    zero: str = "b",
) -> jax.Array:
    """The first value of an adapter's parameter, with `soft` of a prompt; `start` is what it starts from: a DoRA magnitude's
    kernel, or the embedding table, which times `scale` is what the first layer reads. `zero` is LoRA's.
    """
    if soft is not None:
        return prompt.initial(like.shape, start, scale, soft, key)
    return lora.initial(path, like.shape, like.dtype, key, start, zero)
