"""Weight names in both worlds: one table per family, read in both directions.

Hugging Face keeps a tensor per layer and linear weights as (out, in); jaxtune keeps one stacked array for all layers and
linear weights as (in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxtune.types import UserError


class Weight(NamedTuple):
    """`hf` may hold one "{}", the layer's number; `ours` is then a stacked path. `transpose` swaps the last two dims."""

    hf: str
    ours: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf


def linear(hf: str, ours: str, *, bias: bool = False) -> list[Weight]:
    """A linear layer's entries: `hf`.weight (out, in) <-> `ours`.kernel (in, out), and its bias."""
    entries = [Weight(f"{hf}.weight", f"{ours}.kernel", transpose=True)]
    return [*entries, Weight(f"{hf}.bias", f"{ours}.bias")] if bias else entries


def hf_names(table: Iterable[Weight], num_layers: int) -> dict[str, tuple[Weight, int | None]]:
    """Returns every Hugging Face tensor name -> (its entry, its layer or None), in layer order."""
    names: dict[str, tuple[Weight, int | None]] = {}
    for weight in table:
        for layer in range(num_layers) if weight.stacked else (None,):
            names[weight.hf if layer is None else weight.hf.format(layer)] = (weight, layer)
    return names


# Attributes of a Hugging Face config that do not change the forward computation of any decoder.
HARMLESS = frozenset(
    """_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder is_llama_config label2id model_type
    output_attentions output_hidden_states pad_token_id problem_type quantization_config return_dict rope_interleaved
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed use_cache
    unsloth_version max_length""".split()
)


def check_attributes(config: dict[str, Any], handled: Iterable[str], family: str) -> None:
    """Refuses, by name, a config attribute that is switched on and that the family does not handle.

    Raises:
      UserError: naming the attribute and its value.
    """
    if config.get("quantization_config"):
        raise UserError(
            "config.json has quantization_config: pre-quantised weights are not supported; use the full-precision model"
        )
    if config.get("rope_interleaved"):
        raise UserError("config.json has rope_interleaved=True: expected the half-split rotary layout of transformers")
    known = HARMLESS | set(handled)
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}):
            raise UserError(
                f"config.json has {name}={value!r}, which the {family} family does not handle; "
                f"if it does not change the model's maths, remove it from config.json"
            )


def required(config: dict[str, Any], name: str, kind: Callable[[Any], Any] = int) -> Any:
    """Returns `config[name]` as `kind`, or raises `UserError` naming what is missing."""
    if config.get(name) is None:
        raise UserError(
            f"config.json lacks {name!r}: is this a model folder of this architecture? It has {sorted(config)[:12]}"
        )
    return kind(config[name])
