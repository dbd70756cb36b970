"""1 where the completion is JSON that fits a schema: a file's, or each row's own. Extra: rewards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.config import ConfigDict
from jaxtune.rewards import answers
from jaxtune.types import UserError

_COLUMN = "schema"
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def check(row: answers.Row, options: ConfigDict) -> None:
    """Refuses a row without a schema, where no file has one for all.

    Raises:
      UserError: likewise; or the schema is none.
    """
    if not options.json_schema:
        _validator(_of_row(row), f"the row's {_COLUMN!r}")


def make(options: ConfigDict) -> Callable[[str, str, answers.Row], float]:
    """Returns the reward. The JSON is the completion, or what stands last between ``` fences in it.

    Raises:
      UserError: jsonschema is not installed, or the file is no schema.
    """
    shared = _validator(_from_file(options.json_schema), options.json_schema) if options.json_schema else None
    _library()

    def reward(prompt: str, completion: str, row: answers.Row) -> float:
        fenced = _FENCED.findall(completion)
        try:
            value = json.loads(fenced[-1] if fenced else completion)
        except (ValueError, RecursionError):
            return 0.0
        return float((shared or _validator(_of_row(row), f"the row's {_COLUMN!r}")).is_valid(value))

    return reward


def _library() -> Any:
    try:
        import jsonschema
    except ImportError:
        raise UserError(
            "reward 'json_schema' needs jsonschema: pip install 'jaxtune[rewards]', or choose another of reward.functions"
        ) from None
    return jsonschema


def _of_row(row: answers.Row) -> Any:
    schema = row.get(_COLUMN)
    if schema is None:
        raise UserError(
            f"reward 'json_schema' has no schema: set reward.json_schema to a file, or give each row a {_COLUMN!r}; the row "
            f"has {', '.join(map(repr, row))}"
        )
    try:
        return json.loads(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise UserError(f"the row's {_COLUMN!r} is not JSON ({error}); expected a JSON schema") from None


def _from_file(name: str) -> Any:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"reward.json_schema={name!r} is not a file; expected a JSON schema's path")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"reward.json_schema={name!r} is not JSON ({error}); expected a JSON schema") from None


def _validator(schema: Any, what: str) -> Any:
    library = _library()
    try:
        kind = library.validators.validator_for(schema, default=library.Draft202012Validator)
        kind.check_schema(schema)
    except (library.SchemaError, TypeError, AttributeError) as error:
        said = getattr(error, "message", str(error))
        raise UserError(f"{what} is not a JSON schema: {said:.160}") from None
    return kind(schema)
