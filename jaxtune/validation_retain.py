"""Checks of what holds a run near its start, the section `retain` and layers that do not train; `validation_retention.validate` calls them."""

from __future__ import annotations

import math
from typing import Any

from jaxtune.config import ConfigDict, base, keys, lookup
from jaxtune.types import UserError, nearest
from jaxtune.validation_methods import ON_POLICY

PENALTIES = ("kl_base", "l2_start", "ewc", "orthogonal")  # `objectives/penalties.py`
_OF_THE_BATCH = ("data.max_length", "data.packing", "data.max_passage_length", "data.shuffle", "data.prefetch_batches")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field of `retain` whose value is outside what it may be."""
    names = _names(config.retain.penalties)
    _check_penalties(config, names)
    _check_earlier(config, names)
    _check_replay(config)
    layers = config.tune.train_layers
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in layers):
        raise UserError(f"config.tune.train_layers is {layers!r}; expected numbers of layers from 0, such as (10, 11)")
    if (layers or config.tune.freeze) and config.tune.method == "prompt":
        raise UserError(
            "tune.method='prompt' trains virtual tokens alone, which are in no layer: leave tune.train_layers and tune.freeze empty"
        )


def _names(penalties: tuple[Any, ...]) -> list[str]:
    """The penalties that are asked for."""
    names: list[str] = []
    for one in penalties:
        pair = tuple(one) if isinstance(one, tuple | list) else (one,)
        if (
            len(pair) != 2
            or not isinstance(pair[0], str)
            or isinstance(pair[1], bool)
            or not isinstance(pair[1], int | float)
        ):
            raise UserError(
                f"config.retain.penalties has {one!r}; expected (penalty, weight), such as ('kl_base', 0.1)"
            )
        name, weight = pair
        if name not in PENALTIES:
            raise UserError(
                f"config.retain.penalties has {name!r}; expected of {', '.join(PENALTIES)}{nearest(name, PENALTIES)}"
            )
        if not 0 <= weight < 1e12:
            raise UserError(f"config.retain.penalties gives {name!r} the weight {weight}; expected 0 or more")
        if name in names:
            raise UserError(f"config.retain.penalties names {name!r} twice; expected each penalty once")
        names.append(name)
    return names


def _check_penalties(config: ConfigDict, names: list[str]) -> None:
    retain = config.retain
    if "ewc" in names and not (retain.fisher_data or retain.fisher):
        raise UserError(
            "retain.penalties has 'ewc', and neither retain.fisher_data nor retain.fisher says what for: name rows of what is to be kept, "
            "such as (('data.train', URI), ('data.limit', 200)), or an earlier run"
        )
    if retain.fisher_data:
        check_data("retain.fisher_data", retain.fisher_data, "data.train")
    if "kl_base" in names and config.meta.algorithm:
        raise UserError(
            f"retain.penalties: 'kl_base' does not go with meta.algorithm={config.meta.algorithm!r}; 'l2_start' does"
        )
    if "kl_base" in names and retain.kl_to == "base" and config.tune.method == "prompt":
        raise UserError(
            "retain.kl_to='base' with tune.method='prompt': the base does not know virtual tokens; set retain.kl_to='start'"
        )
    if retain.rewarm > config.optim.learning_rate or (retain.rewarm and not config.optim.warmup_steps):
        raise UserError(
            f"retain.rewarm={retain.rewarm} is where the warm-up to optim.learning_rate={config.optim.learning_rate} starts, over "
            f"optim.warmup_steps={config.optim.warmup_steps}: expected at most the former, and a warm-up"
        )


def _check_earlier(config: ConfigDict, names: list[str]) -> None:
    retain, lora = config.retain, config.tune.method == "lora"
    for name, needed in (("orthogonal", "orthogonal" in names), ("merge_earlier", retain.merge_earlier)):
        if needed and not (retain.earlier_adapters and lora):
            raise UserError(
                f"retain: {name!r} is about retain.earlier_adapters={tuple(retain.earlier_adapters)!r} beside a new LoRA (tune.method="
                f"{config.tune.method!r}): name PEFT folders of earlier tasks, and set tune.method='lora'"
            )
    if retain.earlier_adapters and not ("orthogonal" in names or retain.merge_earlier):
        raise UserError(
            "retain.earlier_adapters changes nothing by itself: add ('orthogonal', weight) to retain.penalties, or set retain.merge_earlier=True"
        )
    if retain.merge_earlier and not config.export.merge:
        raise UserError(
            "retain.merge_earlier=True trains an adapter on a base that no one else has: set export.merge=True, which writes the whole model"
        )


def _check_replay(config: ConfigDict) -> None:
    total, taken, objective = 0.0, 0, config.train.objective
    for one in config.retain.replay:
        if not (
            isinstance(one, tuple | list) and len(one) == 3 and isinstance(one[0], str) and one[0] and isinstance(one[1], int | float)
        ):  # fmt: skip
            raise UserError(
                f"config.retain.replay has {one!r}; expected (URI, share, settings), such as ('old.jsonl', 0.1, (('data.prompt', '…'),))"
            )
        uri, share, settings = one
        if not 0 < share < 1:
            raise UserError(f"config.retain.replay gives {uri!r} the share {share}; expected above 0 and below 1")
        check_data(f"retain.replay of {uri!r}", settings)
        total, taken = total + share, taken + math.ceil(share * config.train.batch_size)
    if not config.retain.replay:
        return
    if total >= 1:
        raise UserError(
            f"the shares of retain.replay sum to {total:g}, which leaves no room for data.train: expected below 1"
        )
    if taken > config.train.batch_size:
        raise UserError(
            f"the shares of retain.replay need up to {taken} rows in some batches, and train.batch_size={config.train.batch_size}: raise it"
        )
    distilled = objective == "distill" and (config.distill.mode != "online" or config.distill.on_policy > 0)
    if objective in (*ON_POLICY, "contrastive") or config.meta.algorithm or distilled:
        what = (
            f"meta.algorithm={config.meta.algorithm!r}" if config.meta.algorithm else f"train.objective={objective!r}"
        )
        raise UserError(
            f"retain.replay mixes rows into batches, and those of {what} are no rows on their own: set retain.replay=(), and use "
            "retain.penalties, or train.beside where that goes"
        )


def check_data(key: str, settings: Any, needed: str = "") -> None:
    """Refuses settings of other rows, ((key, value), …), that are not all of the section `data`.

    Raises:
      UserError: naming `key`, and the nearest keys.
    """
    known = [name for name in keys(base()) if name.startswith("data.")]
    if not isinstance(settings, tuple | list):
        raise UserError(f"config.{key} has {settings!r}; expected ((key of data, value), …), or ()")
    for one in settings:
        if not isinstance(one, tuple | list) or len(one) != 2 or not isinstance(one[0], str):
            raise UserError(f"config.{key} has {one!r}; expected (key of data, value), such as ('data.limit', 200)")
        if one[0] not in known:
            raise UserError(f"config.{key} has {one[0]!r}; expected keys of the section data{nearest(one[0], known)}")
        if one[0] in _OF_THE_BATCH:
            raise UserError(f"config.{key} has {one[0]!r}, which is the batch's, and the run's own: leave it out")
        try:
            base().data[one[0].removeprefix("data.")] = one[1]
        except (TypeError, ValueError):
            raise UserError(
                f"config.{key} has {one[0]!r} = {one[1]!r:.60}; expected a {type(lookup(base(), one[0])).__name__}"
            ) from None
    if needed and needed not in [name for name, _ in settings]:
        raise UserError(f"config.{key} lacks {needed!r}, the rows themselves")
