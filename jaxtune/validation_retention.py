"""Checks of the fields that say what a run may cost the model it starts from; `validation.validate` calls them."""

from __future__ import annotations

from jaxtune.config import ConfigDict


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
