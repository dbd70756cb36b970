"""Checks of the sections `merge` and `frontier`; `validation_retention.validate` calls them."""

from __future__ import annotations

import math
import re
from typing import Any

from jaxtune.config import ConfigDict, base, keys
from jaxtune.types import UserError, nearest

# `adapters/arithmetic.py`
MERGES = (
    "cat", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties", "slerp", "svd", "magnitude_prune_svd", "ties_svd",
    "dare_linear_svd", "dare_ties_svd",
)  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_merge(config)
    _check_frontier(config)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_merge(config: ConfigDict) -> None:
    options = config.merge
    if options.method not in MERGES:
        raise UserError(
            f"config.merge.method is {options.method!r}; expected one of {', '.join(MERGES)}{nearest(options.method, MERGES)}"
        )
    for one in options.adapters:
        pair = tuple(one) if isinstance(one, tuple | list) else (one,)
        if len(pair) != 2 or not isinstance(pair[0], str) or not pair[0] or not _is_number(pair[1]):
            raise UserError(
                f"config.merge.adapters has {one!r}; expected (URI, weight), such as ('runs/mine/adapter', 1.0)"
            )
    weights = [weight for _, weight in options.adapters]
    if weights and not any(weights):
        raise UserError("config.merge.adapters has no weight but 0: nothing would be merged")
    arc = len(weights) == 2 and min(weights) >= 0 and math.isclose(sum(weights), 1, abs_tol=1e-6)
    if options.method == "slerp" and weights and not arc:
        raise UserError(
            f"merge.method='slerp' goes from one update to another, and merge.adapters has the weights {weights}; expected two, 1 - t "
            "and t"
        )
    for share in options.sweep:
        if not _is_number(share):
            raise UserError(
                f"config.merge.sweep has {share!r}; expected shares of the merged update, such as (0.0, 0.5, 1.0)"
            )
    if len(set(options.sweep)) < len(options.sweep):
        raise UserError(f"config.merge.sweep is {tuple(options.sweep)!r}; expected each share once")


def _check_frontier(config: ConfigDict) -> None:
    options, known, names = config.frontier, keys(base()), []
    for one in options.methods:
        form = (
            isinstance(one, tuple | list) and len(one) == 3 and isinstance(one[0], str) and isinstance(one[1], tuple | list)
            and isinstance(one[2], tuple | list) and len(one[2]) == 2 and isinstance(one[2][0], str)
            and isinstance(one[2][1], tuple | list) and one[2][1]
        )  # fmt: skip
        if not form:
            raise UserError(
                f"config.frontier.methods has {one!r:.100}; expected (name, ((config key, value), …), (strength key, (value, …)))"
            )
        name, settings, (strength, _) = one
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(
                f"config.frontier.methods has a method called {name!r}; expected letters, digits, '_', '-', '+' or '.'"
            )
        names.append(name)
        for pair in settings:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise UserError(f"config.frontier.methods, {name!r}: {pair!r:.80}; expected (config key, value)")
        for key in [*(pair[0] for pair in settings), strength]:
            own = key.split(".")[0] in ("frontier", "sweep") or key in ("name", "workdir", "checkpoint.resume")
            if key not in known or own:
                raise UserError(
                    f"config.frontier.methods, {name!r}: config key {key!r} does not exist, or is the frontier's own{nearest(key, known)}"
                )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"config.frontier.methods has two methods called {twice!r}; expected different names")
    for one in options.environments:
        if not all(
            isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in one
        ):
            raise UserError(
                f"config.frontier.environments has {one!r:.80}; expected ((name, value), …), both text, for each worker"
            )
    if options.environments and len(options.environments) != options.workers:
        raise UserError(
            f"config.frontier.environments has {len(options.environments)} entries; expected one for each of the frontier.workers="
            f"{options.workers}"
        )
