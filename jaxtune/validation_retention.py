"""Checks of the fields that say what a run may cost the model it starts from; `validation.validate` calls them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Any

from jaxtune import validation_merging, validation_retain
from jaxtune.config import ConfigDict, base, keys, lookup
from jaxtune.types import UserError, nearest

SELVES = ("adapter_off", "start")  # what `distill.teacher` may be beside another model's URI
# Sections whose fields a named set of rows may set for itself, and what such a set says beside them.
OF_ROWS = ("data", "eval", "generate", "reward")
OF_SETS = ("tolerance", "judged")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_lineage(config)
    validation_retain.validate(config)
    validation_merging.validate(config)
    _check_keep_layers(config)
    _check_distill(config)
    _check_protect(config)
    _check_demonstration(config)
    _check_self_distill(config)


def _check_keep_layers(config: ConfigDict) -> None:
    keep = tuple(config.model.keep_layers)
    if not all(isinstance(one, int) and one >= 0 for one in keep) or list(keep) != sorted(set(keep)):
        raise UserError(
            f"config.model.keep_layers is {keep}; expected numbers of layers, from 0, ascending, none twice"
        )
    if keep and config.tune.method in ("lora", "prompt") and not config.export.merge:
        raise UserError(
            f"model.keep_layers makes a model that no folder holds, and an adapter by tune.method={config.tune.method!r} would have no base: "
            "set export.merge=True, or tune.method='full'"
        )


def objectives(config: ConfigDict) -> tuple[str, ...]:
    """The run's objectives, the main one first."""
    return (config.train.objective, *(one[0] for one in config.train.beside))


def _check_on_policy(config: ConfigDict) -> None:
    distill, told = config.distill, f"distill.on_policy={config.distill.on_policy}"
    if not distill.on_policy:
        return
    if config.train.objective != "distill" or config.train.beside:
        raise UserError(
            f"{told} goes with train.objective='distill' alone, not with {config.train.objective!r} and train.beside="
            f"{config.train.beside}: set it to 0.0"
        )
    if distill.mode != "online":
        raise UserError(
            f"{told}: what the student will write is not known before training, and distill.mode={distill.mode!r} asks the teacher then: "
            "set distill.mode='online'"
        )
    if not distill.alpha:
        raise UserError(
            f"{told} with distill.alpha=0.0: no step on its own answers would teach anything; raise distill.alpha"
        )


def _check_layer_map(config: ConfigDict) -> None:
    distill = config.distill
    for pair in distill.layer_map:
        if not (
            isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(one, int) and one >= 0 for one in pair)
        ):
            raise UserError(
                f"config.distill.layer_map has {pair!r}; expected (number of a student's layer, number of a teacher's), from 0"
            )
    weighs = bool(distill.hidden_weight or distill.attention_weight)
    if weighs != bool(distill.layer_map):
        raise UserError(
            f"distill.layer_map={tuple(distill.layer_map)} with distill.hidden_weight={distill.hidden_weight} and attention_weight="
            f"{distill.attention_weight}: pairs of layers need a weight, and a weight needs pairs, such as ((0, 0), (5, 11))"
        )
    if weighs and distill.mode != "online":
        raise UserError(
            f"distill.layer_map needs the teacher's layers in the step, and distill.mode={distill.mode!r} has none: set 'online', or "
            "leave it ()"
        )


def _check_distill(config: ConfigDict) -> None:
    if "distill" not in objectives(config):
        if config.distill.on_policy:
            _check_on_policy(config)
        return
    distill, method = config.distill, config.tune.method
    _check_on_policy(config)
    _check_layer_map(config)
    if not distill.teacher:
        raise UserError(
            "train.objective='distill' learns from a teacher, and distill.teacher is empty: name a model's URI, 'adapter_off' or 'start'"
        )
    if distill.teacher == "adapter_off" and method != "lora":
        raise UserError(
            f"distill.teacher='adapter_off' with tune.method={method!r}: there is no adapter to switch off; set 'start' or another "
            "model's URI"
        )
    if method == "prompt" and distill.mode != "sequence":
        raise UserError(
            "tune.method='prompt' puts virtual tokens before each text that no teacher knows: use 'lora' or 'full', or "
            "distill.mode='sequence'"
        )
    if distill.teacher in SELVES and (distill.teacher_adapter or distill.teacher_tokenizer or distill.teacher_quantize):
        raise UserError(
            f"distill.teacher={distill.teacher!r} is this model itself: leave distill.teacher_adapter, teacher_tokenizer and "
            "teacher_quantize empty"
        )
    if distill.mode != "online" and config.train.objective != "distill":
        raise UserError(
            f"distill.mode={distill.mode!r} prepares the rows of train.objective='distill', not of one in train.beside: set 'online'"
        )
    if distill.mode == "precomputed" and not distill.top_k:
        raise UserError(
            "distill.mode='precomputed' keeps the teacher's likeliest words of each token, and distill.top_k=0 would keep the whole "
            "vocabulary: set how many, such as distill.top_k=64"
        )


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
    if options.sets and options.on_broken != "report" and not options.every_steps:
        raise UserError(
            f"protect.on_broken={options.on_broken!r} is decided where sets are measured while the run trains: set protect.every_steps"
        )
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


def of_other_rows(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (what they are, a config of their own) of rows beside the run's: protected, replayed, of a Fisher information."""
    retain = config.retain
    named = [
        (f"protect.sets, {name!r}", [pair for pair in given if pair[0] not in OF_SETS])
        for name, given in config.protect.sets
    ]
    named += [(f"retain.replay of {uri!r}", settings) for uri, _, settings in retain.replay]
    for what, settings in [*named, ("retain.fisher_data", retain.fisher_data)]:
        if settings:
            yield what, filled(what, settings)[0]


def _set(config: ConfigDict, what: str, key: str, value: Any) -> None:
    section, _, field = key.partition(".")
    try:
        config[section][field] = tuple(value) if isinstance(value, list) else value
    except (TypeError, ValueError):
        kind = type(lookup(config, key)).__name__
        raise UserError(f"config.{what} has {key}={value!r:.60}; expected a {kind}") from None


GOLD = ("rewrite", "demonstration")  # values of self_training.method that start from gold answers


def _check_demonstration(config: ConfigDict) -> None:
    distill, told = config.distill, f"distill.demonstration={config.distill.demonstration!r:.40}"
    if not distill.demonstration:
        return
    _check_tells("distill.demonstration", distill.demonstration)
    if config.train.objective != "distill" or distill.on_policy != 1:
        raise UserError(
            f"{told} is what a teacher sees before the student's own answers: it goes with train.objective='distill' and "
            f"distill.on_policy=1.0, not with {config.train.objective!r} and {distill.on_policy}"
        )
    if distill.layer_map:
        raise UserError(
            f"{told} has teacher and student read different texts, whose layers distill.layer_map cannot compare: set one of them to nothing"
        )
    if config.data.packing:
        raise UserError(
            f"{told} makes the teacher's texts longer than the rows that are packed together: set data.packing=False (the student's answers "
            "are packed all the same)"
        )


def _check_tells(key: str, template: str) -> None:
    try:
        names = {name for _, name, *_ in string.Formatter().parse(template)}
    except ValueError as error:
        raise UserError(f"{key} is not a template ({error}); write {{column}}, and {{{{ for a brace") from None
    if "answer" not in names:
        raise UserError(f"{key}={template!r:.80} does not tell the gold answer: put {{answer}} in it")


def _check_self_distill(config: ConfigDict) -> None:
    chosen, options = config.self_training, config.self_distill
    _check_tells("self_distill.rewrite_prompt", options.rewrite_prompt)
    _check_tells("self_distill.demonstration_prompt", options.demonstration_prompt)
    if options.entropy_floor and not options.entropy_prompts:
        raise UserError(
            f"self_distill.entropy_floor={options.entropy_floor} asks after an entropy that self_distill.entropy_prompts=0 does not measure: "
            "set the latter, such as 32"
        )
    if chosen.method in GOLD and chosen.with_gold:
        raise UserError(
            f"self_training.with_gold=True goes with 'star', 'rft' and 'rest_em': {chosen.method!r} starts from gold answers; set it to False"
        )
    if chosen.method == "demonstration" and chosen.from_base:
        raise UserError(
            "self_training.method='demonstration' has each round taught by what the round before made, from which it goes on: set "
            "self_training.from_base=False"
        )
    for key in ("retain.replay", "train.beside"):
        if chosen.method == "demonstration" and lookup(config, key):
            raise UserError(
                f"self_training.method='demonstration' trains on what the student itself answers, beside which there are no rows of {key}: set "
                "it to (), and use retain.penalties"
            )
    if chosen.method == "demonstration" and config.tune.method == "prompt":
        raise UserError(
            "self_training.method='demonstration' teaches a student by itself, and tune.method='prompt' puts virtual tokens before its "
            "prompts: use 'lora' or 'full'"
        )


def _check_lineage(config: ConfigDict) -> None:
    """What a lineage's releases are held to."""
    lineage = config.lineage
    for key, allowed in {"on_changed_data": ("refuse", "note"), "decide": ("interval", "estimate")}.items():
        if lineage[key] not in allowed:
            raise UserError(
                f"config.lineage.{key} is {lineage[key]!r}; expected one of {', '.join(map(repr, allowed))}"
            )
    for key, low, high in (
        ("replay_share", 0, 0.95), ("margin", 0, 1e6), ("drift_rows", 0, 5000), ("drift_permutations", 19, 10**6),
        ("drift_alpha", 1e-6, 0.5), ("rollback", -1, 2**31 - 1),
    ):  # fmt: skip
        if not low <= lineage[key] <= high:
            raise UserError(f"config.lineage.{key} is {lineage[key]}; expected {low} to {high}")
    for one in lineage.margins:
        if isinstance(one, str) or len(one) != 2 or not isinstance(one[1], int | float) or not one[1] >= 0:
            raise UserError(
                f"config.lineage.margins has {one!r}; expected (name of a stage or protected set, margin of 0 or more)"
            )
    if "://" in lineage.folder:
        raise UserError(f"config.lineage.folder is {lineage.folder!r}; expected a folder of this machine")
    if lineage.force and not lineage.force.strip():
        raise UserError("config.lineage.force is blank; expected the reason in words, which the ledger keeps")
