"""Checks of the fields about people; `validation.validate` calls them."""

from __future__ import annotations

import re
from pathlib import Path

from jaxtune.config import ConfigDict
from jaxtune.types import UserError, nearest


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_review(config)
    _check_guide(config)
    _check_judging(config)
    _check_privacy(config)
    _check_audit(config)
    _check_card(config)


def _check_review(config: ConfigDict) -> None:
    pass


def _check_guide(config: ConfigDict) -> None:
    pass


def _check_judging(config: ConfigDict) -> None:
    pass


_ACTIONS = ("keep", "mask", "pseudonym")


def _check_privacy(config: ConfigDict) -> None:
    section = config.privacy
    pairs = {"kinds": ("kind, action", "email", "mask"), "patterns": ("kind, regex", "ticket", r"T-\d{6}")}
    for name, (what, *example) in pairs.items():
        for pair in section[name]:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
                raise UserError(f"privacy.{name} has {pair!r:.80}; expected ({what}), such as {tuple(example)!r}")
            if not re.fullmatch(r"[a-z][a-z0-9_]*", pair[0]):
                raise UserError(f"privacy.{name} has the kind {pair[0]!r}; expected small letters, digits and _")
        kinds = [pair[0] for pair in section[name]]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise UserError(f"privacy.{name} has {twice!r} twice; expected each kind once")
    for kind, action in section.kinds:
        if action not in _ACTIONS:
            raise UserError(
                f"privacy.kinds has {kind!r} as {action!r}{nearest(action, _ACTIONS)}; expected {', '.join(_ACTIONS)}"
            )
    for kind, expression in section.patterns:
        try:
            re.compile(expression)
        except re.error as error:
            raise UserError(
                f"privacy.patterns, {kind!r}: {expression!r} is not a regular expression: {error}"
            ) from None
    if not 0 < section.min_score <= 1:
        raise UserError(f"privacy.min_score={section.min_score}; expected above 0, and at most 1")
    for name in ("names", "phone_regions", "skip_columns"):
        if wrong := [one for one in section[name] if not isinstance(one, str) or not one.strip()]:
            raise UserError(f"privacy.{name} has {wrong[0]!r}; expected texts")
    if not section.enabled:
        return
    if (section.names or section.names_file) and "name" not in dict(section.kinds):
        raise UserError(
            "privacy.names are given, and privacy.kinds does not say what becomes of them; add ('name', 'mask')"
        )
    if not section.kinds and not section.patterns:
        raise UserError(
            "privacy.enabled=True with neither privacy.kinds nor privacy.patterns: nothing would be looked for; name a kind"
        )


def _check_card(config: ConfigDict) -> None:
    """Named files are looked for before anything is trained, not when the card is written."""
    for key in ("audit", "guidance"):
        place = config.card[key]
        if config.card.enabled and place and not Path(place).expanduser().exists():
            raise UserError(f"card.{key}={place!r} does not exist; expected a file or folder on this machine, or ''")
    if wrong := [one for one in config.card.language if not isinstance(one, str) or not one.strip()]:
        raise UserError(f"card.language has {wrong[0]!r}; expected codes such as 'en'")


def _check_audit(config: ConfigDict) -> None:
    pass
