"""Checks of the fields that say what a run may cost the model it starts from; `validation.validate` calls them."""

from __future__ import annotations

import re
from typing import Any

from jaxtune.config import ConfigDict, base, keys, lookup
from jaxtune.types import UserError, nearest

# Sections whose fields a named set of rows may set for itself, and what such a set says beside them.
OF_ROWS = ("data", "eval", "generate", "reward")
OF_SETS = ("tolerance", "judged")


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_protect(config)


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
