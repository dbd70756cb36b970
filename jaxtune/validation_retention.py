"""Checks of the fields that say what a run may cost the model it starts from; `validation.validate` calls them."""

from __future__ import annotations

import math
import re
from typing import Any

from jaxtune import validation_merging
from jaxtune.config import ConfigDict, base, keys, lookup
from jaxtune.types import UserError, nearest
from jaxtune.validation_methods import ON_POLICY

# Sections whose fields a named set of rows may set for itself, and what such a set says beside them.
OF_ROWS = ("data", "eval", "generate", "reward")
OF_SETS = ("tolerance", "judged")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_protect(config)
    _check_retain(config)
    validation_merging.validate(config)


def _check_protect(config: ConfigDict) -> None:
    options, names = config.protect, []
    for one in options.sets:
        if not (isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)):
            raise UserError(f"config.protect.sets has {one!r:.80}; expected (name, ((key, value), …))")
        name, given = one
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"config.protect.sets has a set called {name!r}; expected letters, digits, '_', '-' or '.'")
        names.append(name)
        filled(f"protect.sets, {name!r}", given)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"config.protect.sets has two sets called {twice!r}; expected different names")
    if not options.sets and (options.every_steps or options.on_broken != "report"):
        key = "every_steps" if options.every_steps else "on_broken"
        raise UserError(
            f"protect.{key}={options[key]!r} asks after protected sets, and there are none: name some in protect.sets"
        )


def filled(what: str, given: Any) -> tuple[ConfigDict, dict[str, Any]]:
    """The config of a set of rows: `base()` with the fields that it sets; and what it says beside them (`OF_SETS`).

    Args:
      what: the set, for errors.
      given: ((key, value), …).

    Raises:
      UserError: a key that no set has, twice the same one, or a value of another type than the field's.
    """
    config, beside = base(), {}
    known = [*OF_SETS, *(key for key in keys(config) if key.split(".")[0] in OF_ROWS)]
    seen: set[str] = set()
    for pair in given if isinstance(given, tuple | list) else [given]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"config.{what} has {pair!r:.80}; expected (key, value)")
        key, value = pair
        if key not in known:
            sections = ", ".join(f"{section}.…" for section in OF_ROWS)
            raise UserError(
                f"config.{what} has the key {key!r}{nearest(key, known) or f'; expected {sections} or {chr(32).join(OF_SETS)}'}"
            )
        if key in seen:
            raise UserError(f"config.{what} sets {key!r} twice; expected each key once")
        seen.add(key)
        if key in OF_SETS:
            beside[key] = value
        else:
            _set(config, what, key, value)
    tolerance = beside.get("tolerance", 0.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1e9:
        raise UserError(
            f"config.{what} has tolerance={tolerance!r}; expected 0 or more: how much worse its metric may become"
        )
    return config, beside


def _set(config: ConfigDict, what: str, key: str, value: Any) -> None:
    section, _, field = key.partition(".")
    try:
        config[section][field] = tuple(value) if isinstance(value, list) else value
    except (TypeError, ValueError):
        kind = type(lookup(config, key)).__name__
        raise UserError(f"config.{what} has {key}={value!r:.60}; expected a {kind}") from None


def _check_retain(config: ConfigDict) -> None:
    retain, lora = config.retain, config.tune.method == "lora"
    names = []
    for one in retain.penalties:
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
        if pair[0] not in PENALTIES:
            raise UserError(
                f"config.retain.penalties has {pair[0]!r}; expected of {', '.join(PENALTIES)}{nearest(pair[0], PENALTIES)}"
            )
        if not 0 <= pair[1] < 1e12:
            raise UserError(f"config.retain.penalties gives {pair[0]!r} the weight {pair[1]}; expected 0 or more")
        names.append(pair[0])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"config.retain.penalties names {twice!r} twice; expected each penalty once")
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
    if retain.rewarm > config.optim.learning_rate or (retain.rewarm and not config.optim.warmup_steps):
        raise UserError(
            f"retain.rewarm={retain.rewarm} is where the warm-up to optim.learning_rate={config.optim.learning_rate} starts, over "
            f"optim.warmup_steps={config.optim.warmup_steps}: expected at most the former, and a warm-up"
        )
    _check_replay(config)


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
    if objective in ON_POLICY or objective == "contrastive" or config.meta.algorithm:
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
    for one in settings:
        if not isinstance(one, tuple | list) or len(one) != 2 or not isinstance(one[0], str):
            raise UserError(f"config.{key} has {one!r}; expected (key of data, value), such as ('data.limit', 200)")
        if one[0] not in known:
            raise UserError(f"config.{key} has {one[0]!r}; expected keys of the section data{nearest(one[0], known)}")
        if one[0] in (
            "data.max_length",
            "data.packing",
            "data.max_passage_length",
            "data.shuffle",
            "data.prefetch_batches",
        ):
            raise UserError(f"config.{key} has {one[0]!r}, which is the batch's, and the run's own: leave it out")
        try:
            base().data[one[0].removeprefix("data.")] = one[1]
        except (TypeError, ValueError):
            raise UserError(
                f"config.{key} has {one[0]!r} = {one[1]!r:.60}; expected a {type(lookup(base(), one[0])).__name__}"
            ) from None
    if needed and needed not in [name for name, _ in settings]:
        raise UserError(f"config.{key} lacks {needed!r}, the rows themselves")


PENALTIES = ("kl_base", "l2_start", "ewc", "orthogonal")  # `objectives/penalties.py`
