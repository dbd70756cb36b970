"""Names to code: an explicit dictionary per room, `name -> module path`, imported on first use; and users' own functions."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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


def function(spec: str, key: str) -> Callable[..., Any]:
    """Returns the user's own function that a config field names: "package.module:name" or "path/file.py:name".

    Args:
      spec: the field's value.
      key: the field, for messages.

    Raises:
      UserError: no such module, file or function; or the module cannot be imported.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise UserError(f"{key}={spec!r}; expected 'package.module:function' or 'path/file.py:function'")
    try:
        if where.endswith(".py"):
            if not Path(where).is_file():
                raise UserError(f"{key}={spec!r}: there is no file {where!r} (from {str(Path.cwd())!r})")
            loader = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert loader is not None
            assert loader.loader is not None
            module = importlib.util.module_from_spec(loader)
            loader.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except UserError:
        raise
    except Exception as error:  # whatever the user's module does while it is imported
        raise UserError(f"{key}={spec!r}: importing {where!r} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        raise UserError(f"{key}={spec!r}: {where} has no function {name!r}{nearest(name, known)}")
    return found
