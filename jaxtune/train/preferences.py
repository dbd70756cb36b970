"""What objectives that compare answers ask of a run: how rows are read, what the reference is, whether answers share a prompt; a critic."""

from __future__ import annotations

from typing import Any

from jaxtune import registry
from jaxtune.config import ConfigDict
from jaxtune.models import flash, spec, splash
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.ops import Objective
from jaxtune.types import UserError

# Objective -> the kind of `data.readers.Reader` that reads its rows.
READERS = {"dpo": "pairs", "cpo": "pairs", "simpo": "pairs", "orpo": "pairs", "kto": "judged", "reward": "rewards"}


def reference(config: ConfigDict) -> str:
    """What `preference.reference` comes to: adapter_off, start, or the URI of another model.

    Raises:
      UserError: the model without its adapter is asked for, and there is no adapter.
    """
    wanted, lora = config.preference.reference, config.tune.method == "lora"
    if wanted == "auto":
        return "adapter_off" if lora and not config.tune.adapter else "start"
    if not wanted or wanted == "none":
        raise UserError(
            f"train.objective={config.train.objective!r} needs a reference, and preference.reference={wanted!r} is none: set 'auto', or "
            "an objective that does without ('simpo', 'cpo', 'orpo')"
        )
    if wanted == "adapter_off" and not lora:
        raise UserError(
            f"preference.reference='adapter_off' with tune.method={config.tune.method!r}: there is no adapter to switch off, so "
            f"train.objective={config.train.objective!r} would have no reference; set 'start' or another model's URI"
        )
    return str(wanted)


def starts_at_a_zero(config: ConfigDict) -> bool:
    """Whether a new LoRA starts with A = 0, not B: where policy and reference would else be equal but for rounding."""
    has_reference = "reference" in registry.load("objective", config.train.objective, OBJECTIVES).OBJECTIVE.frozen
    return config.tune.init == "a_zero" or (config.tune.init == "auto" and has_reference)


def with_values(config: ConfigDict, model_config: Any) -> Any:
    """The model with a critic's head beside its own, where the objective has values."""
    has_values = registry.load("objective", config.train.objective, OBJECTIVES).OBJECTIVE.has_values
    return model_config._replace(value_head=True) if has_values else model_config


def is_precomputed(config: ConfigDict) -> bool:
    """Whether the reference is computed once, before training, and not in every step."""
    return config.train.objective in ("dpo", "kto") and reference(config) != "adapter_off"


def with_reference(config: ConfigDict, objective: Objective) -> Objective:
    """The objective as it gets its reference: from the model in the step, or from the batch."""
    if not is_precomputed(config):
        return objective
    return objective._replace(frozen=(), fields=(*objective.fields, "reference_logps_BT"))


def shares_prompts(config: ConfigDict, model_config: Any, platform: str) -> bool:
    """Whether the answers to a prompt share its tokens, by `preference.share_prompts`.

    The other answer stands between a prompt and the second one: that is no matter where keys are found by their segment and
    position is given, but distances counted in tokens (windows, ALiBi) and recurrences would be wrong.

    Raises:
      UserError: it is asked for, and the model, head or mesh cannot.
    """
    asked = config.preference.share_prompts
    if config.train.objective not in READERS or asked == "never":
        return False
    why = _cannot(config, model_config)
    if asked == "always" and why:
        raise UserError(f"preference.share_prompts='always': {why}; set 'auto' or 'never'")
    tile = {"tpu": splash.TILE_TOKENS, "gpu": flash.TILE_TOKENS}.get(platform)
    by_kernel = config.model.attention == "auto" and tile is not None and config.data.max_length % tile == 0
    return not why and (asked == "always" or not by_kernel)


def _cannot(config: ConfigDict, model_config: Any) -> str:
    """Why the model cannot share prompts; "" where it can."""
    mixers = [block.attention for block, _ in model_config.blocks]
    head = model_config.head
    if any(isinstance(mixer, spec.Delta) for mixer in mixers):
        return "this model's gated delta rule reads a row from its start to its end"
    if not all(getattr(mixer, "causal", True) for mixer in mixers):
        return "this model's prompt sees its answer"
    if any(getattr(mixer, "slopes", ()) for mixer in mixers):
        return "this model's ALiBi counts the tokens between a prompt and its answer"
    if any(0 < window < config.data.max_length for window in model_config.windows):
        return f"this model's windows are shorter than data.max_length={config.data.max_length}"
    if config.mesh.context != 1 or config.mesh.dcn_context != 1:
        return "a mesh with a context axis splits the tokens of a row"
    if config.model.attention in ("splash", "flash"):
        return f"model.attention={config.model.attention!r} knows no branches"
    if config.train.objective == "reward" and head is not None and head.pool != "last":
        return "the head of this model reads more than an answer's last token"
    return ""
