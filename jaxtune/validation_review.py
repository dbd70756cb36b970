"""Checks of the fields about people; `validation.validate` calls them."""

from __future__ import annotations

from jaxtune.config import ConfigDict


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
    pass
