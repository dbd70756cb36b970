"""A chat model behind an OpenAI-compatible endpoint, asked over HTTP with retries. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from jaxtune.types import UserError

Ask = Callable[[Sequence[Mapping[str, str]]], str]
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FATAL = (401, 403, 404, 405)  # asking another question would end the same way
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MOST_BYTES, _MOST_TOKENS = 1 << 20, 512  # of a reply
_LONGEST_WAIT = 60.0  # seconds, whatever the server asks for


class Refused(Exception):
    """This question was not answered, after retries or because the server refuses it; others may be."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def key_of(variable: str) -> str:
    """Returns the key in an environment variable; "" where none is named.

    Raises:
      UserError: the variable is not set.
    """
    if not variable:
        return ""
    if not os.environ.get(variable, "").strip():
        raise UserError(
            f"judging.key_variable={variable!r}: this environment variable is not set; export it with the endpoint's key"
        )
    return os.environ[variable].strip()


def check(url: str, key: str) -> None:
    """Refuses an address that is none, or to which a key would travel in the clear.

    Raises:
      UserError: with what was expected.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"judging.judge={url!r} is no endpoint; expected an address such as https://host/v1")
    if parts.username or parts.password:
        raise UserError("judging.judge has a name or password in it; name an environment variable in key_variable")
    if key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise UserError(f"judging.judge={url!r} would send the key unencrypted; expected https://")


def client(url: str, model: str, key: str = "", timeout: float = 60.0, retries: int = 4, backoff: float = 1.0) -> Ask:
    """Returns `ask(messages) -> reply`, greedy; safe to call from several threads.

    Args:
      url: the endpoint's base, such as https://host/v1; /chat/completions is added.
      backoff: seconds before the first retry, doubled for each further one; a server's Retry-After comes first.

    Raises (from `ask`):
      Refused: there was no answer to this question.
      UserError: the endpoint refuses the key, or has no such model or address.
    """
    check(url, key)
    own = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in _LOOPBACK else []
    opener = urllib.request.build_opener(_NoRedirect(), *own)
    address = url.rstrip("/") + ("" if url.rstrip("/").endswith("/chat/completions") else "/chat/completions")
    headers = {"Content-Type": "application/json", "User-Agent": "jaxtune"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": _MOST_TOKENS}  # as this server wants them

    def ask(messages: Sequence[Mapping[str, str]]) -> str:
        why = ""
        for attempt in range(retries + 1):
            try:
                body = json.dumps({"model": model, "messages": list(messages), **settings}).encode()
                with opener.open(urllib.request.Request(address, body, headers), timeout=timeout) as response:
                    return _content(_whole(response, time.monotonic() + timeout))
            except urllib.error.HTTPError as error:
                with error:
                    why = f"HTTP {error.code}: {_shown(error, key)}"
                if error.code in _FATAL:
                    raise UserError(f"the judge {address} refuses ({why}); check address, model and key") from None
                if error.code not in _AGAIN and not _adapted(settings, why):
                    raise Refused(why) from None
                wait = _wait(error.headers.get("Retry-After"), backoff * 2**attempt)
            except (OSError, http.client.HTTPException, ValueError) as error:
                why, wait = f"{type(error).__name__}: {error}", _wait(None, backoff * 2**attempt)
            if attempt < retries:
                time.sleep(wait)
        raise Refused(why)

    return ask


def _adapted(settings: dict[str, Any], why: str) -> bool:
    """Changes a setting that the server says it does not take, once each; some models have another name for a reply's length."""
    if "max_tokens" in why and settings.pop("max_tokens", None):
        settings["max_completion_tokens"] = _MOST_TOKENS
        return True
    return "temperature" in why and settings.pop("temperature", None) is not None


def _shown(error: urllib.error.HTTPError, key: str) -> str:
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    text = " ".join(text.split())[:200]
    return text.replace(key, "(key)") if key else text


def _wait(asked: str | None, own: float) -> float:
    try:
        return min(max(0.0, float(asked or "")), _LONGEST_WAIT)
    except ValueError:  # none, or a date
        return min(own * (0.5 + random.random()), _LONGEST_WAIT)


def _whole(response: http.client.HTTPResponse, until: float) -> bytes:
    """The reply, if it is there by then: the socket's own timeout is of each piece, and pieces may come for ever.

    Raises:
      TimeoutError: it is not.
    """
    parts: list[bytes] = []
    while (part := response.read1(1 << 16)) and sum(map(len, parts)) < _MOST_BYTES:
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError("the reply came too slowly; timed out")
    return b"".join(parts)


def _content(body: bytes) -> str:
    """The reply's text.

    Raises:
      ValueError: it is no reply of this kind.
    """
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no chat completion came: {body[:80]!r}") from error
    if not isinstance(content, str):
        raise ValueError("a reply without text came")
    return content
