"""Names to modules: an explicit dictionary per room, `name -> module path`, imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType

from jaxtune.types import UserError, nearest


def load(kind: str, name: str, table: dict[str, str]) -> ModuleType:
    """Imports and returns the module registered as `name` in `table`.

    Raises:
      UserError: `name` is not registered; the message lists the names of this `kind`.
    """
    if name not in table:
        raise UserError(
            f"unsupported {kind} {name!r}{nearest(name, list(table))}; supported: {', '.join(sorted(table))}"
        )
    return importlib.import_module(table[name])
