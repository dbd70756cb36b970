"""Checks of the fields about people; `validation.validate` calls them."""

from __future__ import annotations

import re

from jaxtune.config import ConfigDict
from jaxtune.types import UserError


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_review(config)
    _check_guide(config)
    _check_judging(config)
    _check_privacy(config)
    _check_audit(config)


def _check_review(config: ConfigDict) -> None:
    pass


def _check_guide(config: ConfigDict) -> None:
    pass


def _check_judging(config: ConfigDict) -> None:
    pass


def _check_privacy(config: ConfigDict) -> None:
    pass


def _check_audit(config: ConfigDict) -> None:
    c = config.audit
    if c.split not in ("", "train", "validation", "test", "all"):
        raise UserError(
            f"config.audit.split is {c.split!r}; expected train, validation, test, all, or '' for eval.split"
        )
    for key in ("rows", "worst_rows", "bbq_rows", "crows_rows"):
        if c[key] < 0:
            raise UserError(f"config.audit.{key} is {c[key]}; expected 0 or more")
    names = [one[0] for one in c.models if len(one) == 2 and all(isinstance(part, str) for part in one)]
    if (
        len(names) < len(c.models)
        or len(set(names)) < len(names)
        or not all(re.fullmatch(r"[\w. -]+", name) for name in names)
    ):
        raise UserError(
            f"config.audit.models is {tuple(c.models)!r}; expected ((name, what), …), plain names, none twice"
        )
    for kind in c.augment:
        if kind not in ("swaps", "templates"):
            raise UserError(f"config.audit.augment has {kind!r}; expected 'swaps' or 'templates'")
    if "templates" in c.augment and not c.templates:
        raise UserError("config.audit.augment has 'templates', and audit.templates has none: add one")
