"""Checks of the fields about people; `validation.validate` calls them."""

from __future__ import annotations

import math
import re
from pathlib import Path

from jaxtune.config import ConfigDict
from jaxtune.types import UserError, nearest

FLAGS = ("bias", "privacy", "harm", "wrong", "off_guideline")  # as review/record.py has them
_CHOICES = {
    "action": ("serve", "invite", "import", "export", "report"),
    "role": ("expert", "senior", "owner"),
    "format": ("jsonl", "label_studio", "argilla"),
}


def validate(config: ConfigDict) -> None:
    """Raises `UserError` naming the first field whose value is outside what it may be."""
    _check_review(config)
    _check_guide(config)
    _check_judging(config)
    _check_privacy(config)
    _check_audit(config)
    _check_card(config)


def _check_review(config: ConfigDict) -> None:
    c = config.review
    for key, choices in _CHOICES.items():
        if c[key] not in choices:
            raise UserError(f"review.{key}={c[key]!r}{nearest(c[key], choices)}; expected one of {', '.join(choices)}")
    pairs = [pair for pair in c.columns if isinstance(pair, tuple | list) and len(pair) == 2]
    if len(pairs) < len(c.columns) or not all(isinstance(one, str) for pair in pairs for one in pair):
        raise UserError(
            f'review.columns={tuple(c.columns)!r:.80}; expected pairs of names, such as (("text", "review"),)'
        )
    for key, low, high in (
        ("round", 1, 1_000_000), ("invite_days", 0.01, 365), ("port", 1, 65535), ("session_hours", 0.1, 24 * 31), ("lease_seconds", 10, 86400), ("requests_per_second", 1, 1e5),
    ):  # fmt: skip
        if not low <= c[key] <= high:
            raise UserError(f"review.{key}={c[key]}; expected {low:g} to {high:g}")
    if bool(c.tls_cert) != bool(c.tls_key):
        raise UserError("review.tls_cert and review.tls_key go together; give both files, or neither")
    if c.host not in ("127.0.0.1", "::1", "localhost") and not (c.tls_cert or c.behind_proxy):
        raise UserError(
            f"review.host={c.host!r} lets other machines in, and passwords would cross the network as text; give "
            "review.tls_cert and review.tls_key, or set review.behind_proxy=True where a proxy ends TLS"
        )


def _check_guide(config: ConfigDict) -> None:
    guide = config.guide
    for key, allowed in (("answers", ("outputs", "rows")), ("edits", ("majority", "each"))):
        if guide[key] not in allowed:
            raise UserError(f"config.guide.{key} is {guide[key]!r}; expected one of {', '.join(map(repr, allowed))}")
    lowest = {
        "least_gain": 0.0,
        "round": 1,
        "start_from": -1,
        "rows": 0,
        "candidates": 1,
        "max_new_tokens": 1,
        "slots": 1,
        "compare_rows": 0,
    }
    for key, least in lowest.items():
        if guide[key] < least:
            raise UserError(f"config.guide.{key} is {guide[key]!r}; expected {least} or more")
    for key, low, high in (("enough", 0.0, 1.0), ("top_p", 0.0, 1.0), ("temperature", 0.0, 100.0)):
        if not low <= guide[key] <= high:
            raise UserError(f"config.guide.{key} is {guide[key]!r}; expected a number from {low:g} to {high:g}")
    if guide.candidates > 26:
        raise UserError(f"config.guide.candidates is {guide.candidates}; expected 26 or fewer")
    if not guide.poll_seconds > 0:
        raise UserError(f"config.guide.poll_seconds is {guide.poll_seconds!r}; expected seconds, more than 0")
    if guide.start_from >= guide.round:
        raise UserError(
            f"config.guide.start_from is {guide.start_from}; expected a round before guide.round={guide.round}, 0 for the first model"
        )
    wrong = next((one for one in guide.keep_flagged if one not in FLAGS), None)
    if wrong is not None:
        raise UserError(
            f"config.guide.keep_flagged has {wrong!r}{nearest(str(wrong), FLAGS)}; expected types of {', '.join(FLAGS)}"
        )
    for entry in guide.trust:
        pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        if (
            not pair
            or isinstance(entry[1], bool)
            or not isinstance(entry[1], int | float)
            or not 0 <= entry[1] < math.inf
        ):
            raise UserError(f"config.guide.trust has {entry!r:.80}; expected (name, weight), a weight of 0 or more")


def _check_judging(config: ConfigDict) -> None:
    judging = config.judging
    for key, low, high in (("alpha", 0.0, 1.0), ("margin", -1.0, 0.5), ("trust", 0.0, 1.0)):
        value = judging[key]
        if not low < value < high:
            raise UserError(f"judging.{key}={value}; expected a number between {max(low, 0.0):g} and {high:g}")
    for key, least in (("margin", 0.0), ("limit", 0), ("follow_seconds", 0.0), ("retries", 0), ("parallel", 1)):
        if judging[key] < least:
            raise UserError(f"judging.{key}={judging[key]}; expected {least:g} or more")
    if judging.timeout_seconds <= 0:
        raise UserError(f"judging.timeout_seconds={judging.timeout_seconds}; expected more than 0")
    names = tuple(judging.names)
    if len(names) != 2 or len(set(names)) != 2 or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"judging.names={names!r}; expected two names that differ")
    if judging.judge not in ("", "local") and not judging.judge.startswith(("http://", "https://")):
        raise UserError(
            f"judging.judge={judging.judge!r}; expected '', 'local' or an address such as 'https://host/v1'"
        )
    if judging.judge.startswith("http") and not judging.judge_model:
        raise UserError(
            "judging.judge is an endpoint and judging.judge_model is empty; expected the model's name there"
        )


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
    c = config.audit
    if c.split not in ("", "train", "validation", "test", "all"):
        raise UserError(
            f"config.audit.split is {c.split!r}; expected train, validation, test, all, or '' for eval.split"
        )
    for key in ("rows", "worst_rows", "bbq_rows", "crows_rows"):
        if c[key] < 0:
            raise UserError(f"config.audit.{key} is {c[key]}; expected 0 or more")
    pairs = [one for one in c.models if isinstance(one, tuple | list) and len(one) == 2]
    names = [one[0] for one in pairs if all(isinstance(part, str) for part in one)]
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
