"""Chats as the chat template wants them: OpenAI and ShareGPT turns checked and brought to one shape."""

from __future__ import annotations

import json
import math
from typing import Any

from jaxtune.types import UserError, nearest

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


def check_messages(messages: list[Any], answers: bool = True) -> list[Message]:
    """Returns copies of OpenAI messages: contents are strings, tool-call arguments are objects, roles are `ROLES`.

    Raises:
      UserError: no message, an unknown role, a content that is not text, a wrong `weight` or tool call, or (with
        `answers`) no assistant message.
    """
    if not messages:
        raise UserError("the list of messages is empty; expected at least a user and an assistant message")
    checked = [_message(f"message {number}", message) for number, message in enumerate(messages, 1)]
    if answers and not any(message["role"] == "assistant" for message in checked):
        raise UserError("no assistant message, so nothing to learn; expected at least one")
    return checked


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"{where} is {message!r:.60}; expected an object with role and content")
    role = message.get("role", "")
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        allowed = (*ROLES, *_OTHER_ROLES)
        raise UserError(f"{where}: unknown role {role!r}{nearest(str(role), allowed)}; allowed: {', '.join(allowed)}")
    checked = {**message, "role": role, "content": _content(where, message)}
    if "weight" in message:
        weight = message["weight"]
        if weight is None:
            del checked["weight"]
        elif role != "assistant":
            raise UserError(f"{where}: weight on a {role} message; only assistant messages may carry one")
        elif isinstance(weight, bool) or weight not in (0, 1):
            raise UserError(f"{where}: weight is {weight!r}; expected 0 or 1")
    if checked.pop("spans", None):
        checked["spans"] = _spans(where, role, checked["content"], message["spans"])
    if message.get("tool_calls"):
        checked["tool_calls"] = _tool_calls(where, role, message["tool_calls"])
    else:
        checked.pop("tool_calls", None)  # a null or an empty list means none, but templates test for the key
    return checked


def _spans(where: str, role: str, content: str, spans: Any) -> list[tuple[int, int, float]]:
    """Loss weights of parts of a content: [start, end, weight] in characters, a later one over an earlier."""
    if role != "assistant" or not isinstance(spans, list):
        raise UserError(f"{where}: spans must be a list, on an assistant message")
    for span in spans:
        numbers = isinstance(span, list | tuple) and len(span) == 3 and not any(isinstance(n, bool) for n in span)
        if not numbers or not all(isinstance(n, int) for n in span[:2]) or not isinstance(span[2], int | float):
            raise UserError(f"{where}: span {span!r:.60}; expected [start, end, weight], the first two in characters")
        if not 0 <= span[0] < span[1] <= len(content):
            raise UserError(f"{where}: span {span!r:.60} is not inside the content, of {len(content)} characters")
        if not 0 <= span[2] < math.inf:
            raise UserError(f"{where}: span {span!r:.60} has weight {span[2]!r}; expected 0 or more")
    return [(start, end, float(weight)) for start, end, weight in spans]


def _content(where: str, message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise UserError(f"{where}: content part {kind!r:.60}; only text parts are supported")
        return "".join(part["text"] for part in content)
    if "content" not in message:
        known = ", ".join(map(repr, message))
        raise UserError(f"{where}: no field 'content'{nearest('content', list(message))}; the message has {known}")
    raise UserError(f"{where}: content is {content!r:.60}; expected a string (null only beside tool_calls)")


def _tool_calls(where: str, role: str, calls: Any) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls must be a list, on an assistant message")
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f'{where}: tool call {call!r:.60}; expected {{"function": {{"name": …, "arguments": …}}}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            # OpenAI stores a JSON string; Hugging Face templates print an object and would quote the string again.
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: arguments of tool {function['name']!r} are not JSON ({error.msg})") from None
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Returns the tools a chat may call: a list of JSON schemas (also given as a JSON string), or None."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except json.JSONDecodeError as error:
            raise UserError(f"tools are not JSON ({error.msg}); expected a list of functions") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"tools are {tools!r:.60}; expected a list of functions")
    return tools


def from_sharegpt(turns: list[Any], system: Any = None) -> list[Message]:
    """Returns ShareGPT turns (`from`, `value`) as unchecked OpenAI messages; `system` goes first when given."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            has = ", ".join(map(repr, turn)) if isinstance(turn, dict) else repr(turn)[:60]
            raise UserError(f"turn {number} has {has}; expected 'from' and 'value'")
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
            role, known = turn["from"], list(_SHAREGPT_ROLES)
            hint = nearest(str(role), known)
            raise UserError(f"turn {number}: unknown role {role!r}{hint}; allowed: {', '.join(known)}")
        message = {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        messages.append({**message, "weight": turn["weight"]} if "weight" in turn else message)
    return messages
