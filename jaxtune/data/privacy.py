"""Personal data in rows: found, then kept, masked, or replaced by surrogates, before a model or a person sees the row.

`of` reads the section `privacy` of the config; what it returns turns a row as a file holds it into one that may be seen.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxtune.config import ConfigDict
from jaxtune.data import recognizers, surrogates
from jaxtune.data.recognizers import Find, Span

Row = dict[str, Any]
_PSEUDONYM_PASSES = 4  # surrogates that stand against other words may be found again: then they are masked, which ends
TOLD = {"keep": "kept", "mask": "masked", "pseudonym": "pseudonymised"}
_HIDDEN = " names, not shown"
_SHORTEST_NUMBER = 10**6  # a whole number below it is no phone, card or account number


class Finding(NamedTuple):
    """That a row held something, and what became of it; not what it was. `start` counts in the row's own text."""

    kind: str
    action: str  # keep | mask | pseudonym
    field: str  # "text", "messages[2].content"
    start: int
    length: int


class Private:
    """What makes rows private; a pure function of a row, of the config and of the key. Its `repr` shows no key and no name.

    Args:
      actions: kind -> keep | mask | pseudonym; other kinds are not looked for.
      finders: what looks for them.
      same: a person's spelling, in its plain form -> who that is.
      key: of the surrogates; b"" where there are none.
      regions: countries whose phone numbers are known without their country code.
      skipped: columns that are left as they are.
      is_listed: what looks for names, so that no surrogate is one of them.
    """

    def __init__(
        self, actions: dict[str, str], finders: Sequence[Find], same: dict[str, str] | None = None, key: bytes = b"",
        regions: Sequence[str] = (), skipped: Sequence[str] = (), is_listed: Find | None = None,
    ):  # fmt: skip
        self.actions = actions
        self._finders, self._same, self._key = tuple(finders), same or {}, key
        self._is_listed = is_listed
        self._regions, self._skipped = tuple(regions), frozenset(skipped)
        self._known = surrogates.known({*actions, *recognizers.ENTITIES, recognizers.NAME})

    def row(self, row: Row) -> tuple[Row, tuple[Finding, ...]]:
        """Returns the row with every text in it made private, texts in lists and objects too, and what was found.

        Whole numbers of seven digits and more are looked at as texts, for a template would write them as such.
        """
        found: list[Finding] = []
        made = {
            name: value if name in self._skipped else self._value(value, name, found) for name, value in row.items()
        }
        return (made, tuple(found)) if found else (row, ())

    def text(self, text: str, field: str = "text") -> tuple[str, tuple[Finding, ...]]:
        """Returns the text made private, and what was found in it. What is so already stays as it is."""
        found: list[Finding] = []
        shifts: list[tuple[int, int]] = []  # (end of what was put in, how much longer the text was made)
        for passes in itertools.count():
            spans = self._spans(text)
            for span in spans:
                if self.actions[span.kind] != "keep" or not shifts:
                    start = span.start - sum(by for end, by in shifts if end <= span.start)
                    found.append(Finding(span.kind, self.actions[span.kind], field, start, span.end - span.start))
            replaced = [span for span in spans if self.actions[span.kind] != "keep"]
            if not replaced:
                return text, tuple(found)
            # Again, for without its neighbours a word may be found that was not.
            text, shifts = self._replaced(text, replaced, shifts, passes >= _PSEUDONYM_PASSES)
        raise AssertionError

    def _value(self, value: Any, field: str, found: list[Finding]) -> Any:
        if isinstance(value, str):
            made, here = self.text(value, field)
            found.extend(here)
            return made if made == value else self._as_json(value, made)
        if isinstance(value, list):
            return [self._value(one, f"{field}[{number}]", found) for number, one in enumerate(value)]
        if isinstance(value, dict):
            return {name: self._value(one, f"{field}.{name}", found) for name, one in value.items()}
        if isinstance(value, int) and abs(value) >= _SHORTEST_NUMBER:
            made = self._value(str(value), field, found)
            return value if made == str(value) else made
        return value

    def _as_json(self, value: str, made: str) -> str:
        """What was JSON stays JSON, such as a tool call's arguments: a number in it becomes a text."""
        if not value.lstrip().startswith(("{", "[")) or _is_json(made) or not _is_json(value):
            return made
        return json.dumps(self._value(json.loads(value), "", []), ensure_ascii=False)

    def _spans(self, text: str) -> list[Span]:
        """What is to be told or replaced, in the order of the text; none overlaps another."""
        found = [span for find in self._finders for span in find(text)]
        if not found:
            return []
        found = [span for span in found if not self._is_known(text, span)]
        replaced = [span for span in found if self.actions[span.kind] != "keep"]
        made = _joined(replaced)
        taken = [(span.start, span.end) for span in made]
        kept = [s for s in found if self.actions[s.kind] == "keep"]
        free = [s for s in kept if not any(s.start < end and start < s.end for start, end in taken)]
        return sorted(made + _strongest(free))

    def _is_known(self, text: str, span: Span) -> bool:
        """Whether it touches a mask or a surrogate, which are nobody's data."""
        near = text[max(0, span.start - surrogates.LONGEST) : span.end + surrogates.LONGEST]
        at = span.start - max(0, span.start - surrogates.LONGEST)
        end = at + span.end - span.start
        return any(match.start() < end and at < match.end() for match in self._known.finditer(near))

    def _replaced(
        self, text: str, spans: list[Span], shifts: list[tuple[int, int]], masked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        parts, at, moved = [], 0, 0
        ends: list[tuple[int, int]] = []
        old = list(shifts)
        for span in spans:
            new = self._instead(span, text, masked)
            while old and old[0][0] <= span.start:
                ends.append((old[0][0] + moved, old.pop(0)[1]))
            parts += [text[at : span.start], new]
            at = span.end
            longer = len(new) - (span.end - span.start)
            moved += longer
            ends.append((span.end + moved, longer))
        ends += [(end + moved, by) for end, by in old]
        return "".join([*parts, text[at:]]), ends

    def _instead(self, span: Span, text: str, masked: bool) -> str:
        kind = span.kind
        if masked or self.actions[kind] == "mask":
            return f"[{kind.upper()}]"
        told = plain(kind, text[span.start : span.end], self._regions)
        identity = self._same.get(told, f"{kind}:{told}")
        made = surrogates.surrogate(kind, told, identity, self._key)
        while kind == recognizers.NAME and self._is_listed and any(self._is_listed(made)):
            identity += "'"  # it is somebody's
            made = surrogates.surrogate(kind, told, identity, self._key)
        return made


def of(section: ConfigDict) -> Private | None:
    """Returns what the section `privacy` of a config asks for; None where it is off.

    Raises:
      UserError: an extra is missing, a kind that nobody knows, no names or no key.
    """
    if not section.enabled:
        return None
    actions, own = dict(section.kinds), dict(section.patterns)
    actions |= {kind: "mask" for kind in own if kind not in actions}
    regions = tuple(section.phone_regions)
    people = recognizers.people_of(section.names)
    if section.names_file:
        from jaxtune import fetch

        people += recognizers.read_names(fetch.local(section.names_file))
    finders, is_listed = [], None
    for kind in actions:
        if kind in own:
            finders.append(recognizers.pattern(kind, own[kind]))
        elif kind != recognizers.NAME:
            finders.append(recognizers.recognizer(kind, regions, section.min_score))
        if kind == recognizers.NAME and people:  # beside a pattern of that kind
            spellings = [spelling for one in people for spelling in one if _kind_of(spelling) == recognizers.NAME]
            is_listed = recognizers.names(spellings)
            finders.append(is_listed)
    same = {plain(_kind_of(s), s, regions): f"person:{one[0]}" for one in people for s in one}
    wants_key = "pseudonym" in actions.values()
    key = surrogates.key(section.key_file, section.key_variable) if wants_key else b""
    return Private(actions, finders, same, key, regions, section.skip_columns, is_listed)


def plain(kind: str, text: str, regions: Sequence[str] = ()) -> str:
    """Returns the one form of all spellings of an address, number or name."""
    if kind == "phone":
        return _phone(text, tuple(regions))
    if kind == recognizers.NAME:
        return unicodedata.normalize("NFC", " ".join(recognizers.words(text))).casefold()
    if kind in ("email", "url", "ip"):
        return text.strip().casefold()
    return "".join(character for character in text if character.isalnum()).casefold() or text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _phone(text: str, regions: tuple[str, ...]) -> str:
    """With its country code, where a region's rules know the number."""
    import phonenumbers

    for region in (None, *regions):
        try:
            number = phonenumbers.parse(text, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            return str(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164))
    return "".join(character for character in text if character.isdigit())


def _kind_of(spelling: str) -> str:
    """What a person's spelling in the list of names is."""
    if "@" in spelling:
        return "email"
    letters, digits = (sum(map(test, spelling)) for test in (str.isalpha, str.isdigit))
    return "phone" if digits >= 6 and not letters else recognizers.NAME


def _joined(spans: list[Span]) -> list[Span]:
    """Spans that overlap as one, of all that they cover: as the kind that is surest, then longest, then first."""
    made: list[list[Span]] = []
    reach = -1
    for span in sorted(spans):
        if span.start < reach:
            made[-1].append(span)
        else:
            made.append([span])
        reach = max(reach, span.end)
    return [
        max(group, key=_strength)._replace(start=group[0].start, end=max(span.end for span in group)) for group in made
    ]


def _strongest(spans: list[Span]) -> list[Span]:
    chosen: list[Span] = []
    for span in sorted(spans, key=_strength, reverse=True):
        if not any(span.start < other.end and other.start < span.end for other in chosen):
            chosen.append(span)
    return chosen


def _strength(span: Span) -> tuple[float, int, int, str]:
    return span.score, span.end - span.start, -span.start, span.kind


# What is told of it


def counts(rows: Iterable[Sequence[Finding]]) -> dict[str, Any]:
    """Returns `{"rows": rows with findings, "found": {kind: {kept, masked or pseudonymised: number}}}`."""
    found: dict[str, Counter[str]] = {}
    number = 0
    for row in rows:
        number += bool(row)
        for one in row:
            found.setdefault(one.kind, Counter())[TOLD[one.action]] += 1
    return {"rows": number, "found": {kind: dict(found[kind]) for kind in sorted(found)}}


def told(counted: dict[str, Any]) -> str:
    """Returns the counts in words: "120 email masked, 3 phone pseudonymised, in 80 rows"; "none" where nothing was found."""
    parts = [f"{n:,} {kind} {how}" for kind, hows in counted["found"].items() for how, n in hows.items()]
    return f"{', '.join(parts)}, in {counted['rows']:,} rows" if parts else "none found"


def table(rows: Iterable[tuple[str, str, Sequence[Finding]]]) -> str:
    """Returns a CSV of all findings of `(split, row, findings)`: where and what, never the text itself."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "row", "field", "kind", "action", "start", "length"))
    for split, row_id, found in rows:
        writer.writerows((split, row_id, f.field, f.kind, f.action, f.start, f.length) for f in found)
    return text.getvalue()


def without_names(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config, as a dictionary, that may be shown: with how many names it lists, not which."""
    section = config.get("privacy", {})
    names = section.get("names")
    if not names or str(names[0]).endswith(_HIDDEN):
        return config
    return {**config, "privacy": {**section, "names": (f"{len(names)}{_HIDDEN}",)}}
