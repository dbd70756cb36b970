"""Checks of the fields that say what a run may cost the model it starts from; `validation.validate` calls them."""

from __future__ import annotations

from jaxtune.config import ConfigDict
from jaxtune.types import UserError


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_update(config)


def _check_update(config: ConfigDict) -> None:
    """What a lineage's releases are held to."""
    update = config.update
    for key, allowed in {"on_changed_data": ("refuse", "note"), "decide": ("interval", "estimate")}.items():
        if update[key] not in allowed:
            raise UserError(f"config.update.{key} is {update[key]!r}; expected one of {', '.join(map(repr, allowed))}")
    for key, low, high in (
        ("replay_share", 0, 0.95), ("margin", 0, 1e6), ("drift_rows", 0, 5000), ("drift_permutations", 19, 10**6),
        ("drift_alpha", 1e-6, 0.5), ("rollback", -1, 2**31 - 1),
    ):  # fmt: skip
        if not low <= update[key] <= high:
            raise UserError(f"config.update.{key} is {update[key]}; expected {low} to {high}")
    for one in update.margins:
        if isinstance(one, str) or len(one) != 2 or not isinstance(one[1], int | float) or not one[1] >= 0:
            raise UserError(f"config.update.margins has {one!r}; expected (name of a stage or protected set, margin of 0 or more)")
    if "://" in update.lineage:
        raise UserError(f"config.update.lineage is {update.lineage!r}; expected a folder of this machine")
    if update.force and not update.force.strip():
        raise UserError("config.update.force is blank; expected the reason in words, which the ledger keeps")
