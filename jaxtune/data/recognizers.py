"""Where a text holds personal data: Presidio's pattern recognizers, lists of names, and patterns of the user's own.

Presidio's recognizers are asked one by one, without its engine: that one needs a language model for names, which this does not.
Each is shown only the parts of a text that may hold what it looks for.
"""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.types import UserError, nearest

ENTITIES = {"email": "EMAIL_ADDRESS", "phone": "PHONE_NUMBER", "iban": "IBAN_CODE", "ip": "IP_ADDRESS"}
NAME = "name"
_REMEMBERED = 400  # characters of a part of a text whose findings are remembered, at most
_CONTEXT_WORDS, _CONTEXT_BONUS, _CONTEXT_SCORE = 5, 0.35, 0.4  # as Presidio's own enhancer has them


class Span(NamedTuple):
    """What was found at `text[start:end]`; `score` is how sure that is, 1 where a checksum or a list says so."""

    start: int
    end: int
    kind: str
    score: float


Find = Callable[[str], Iterable[Span]]
_Windows = Callable[[str], Iterable[tuple[int, int]]]


def recognizer(kind: str, regions: Sequence[str], min_score: float) -> Find:
    """Returns what finds one kind in a text: "email", "us_ssn", or any other of Presidio's entities in small letters.

    Args:
      kind: what to look for.
      regions: countries whose phone numbers are known without their country code.
      min_score: findings below it are left out; a word of a recognizer's context shortly before one adds to its score.

    Raises:
      UserError: presidio-analyzer is not installed, or has no such kind.
    """
    entity = ENTITIES.get(kind, kind.upper())
    made, windows = _made(entity, _plans(regions)), _WINDOWS.get(entity, _with_digits)

    @functools.lru_cache(maxsize=65536)  # addresses, hosts and dates come again and again
    def seen(part: str) -> tuple[Span, ...]:
        return tuple(Span(one.start, one.end, kind, one.score) for one in made.analyze(part, [entity]))

    context = tuple(word.strip().lower() for word in made.context or ())

    def find(text: str) -> Iterator[Span]:
        text = text.translate(_PLAIN)
        for start, end in windows(text):
            part = text[start:end]
            for found in seen(part) if end - start <= _REMEMBERED else seen.__wrapped__(part):
                score = found.score
                if score < 1 and context and _has_context(text, start + found.start, context):
                    score = min(1.0, max(score + _CONTEXT_BONUS, _CONTEXT_SCORE))
                if score >= min_score:
                    yield Span(start + found.start, start + found.end, kind, score)

    return find


def pattern(kind: str, expression: str) -> Find:
    """Returns what finds a regular expression: its group 1 where there is one, else all of it."""
    compiled = re.compile(expression)
    group = 1 if compiled.groups else 0

    def find(text: str) -> Iterator[Span]:
        for match in compiled.finditer(text):
            start, end = match.span(group)
            if end > start:
                yield Span(start, end, kind, 1.0)

    return find


def names(listed: Iterable[str]) -> Find:
    """Returns what finds names of a list, word by word, whatever stands between: "Ann-Marie Lee" is also "ANN MARIE LEE".

    A word that is listed with a capital is found only with one, for "will" and "mark" are words too.
    """
    by_first: dict[str, list[list[str]]] = {}
    for name in listed:
        words = _WORD.findall(name)
        by_first.setdefault(_spelled(words[0]), []).append(words)

    def find(text: str) -> Iterator[Span]:
        for match in _WORD.finditer(text):
            for words in by_first.get(_spelled(match[0]), ()):
                end = _reaches(text, match, words)
                if end:
                    yield Span(match.start(), end, NAME, 1.0)

    return find


def read_names(path: Path) -> list[list[str]]:
    """Returns the people of a file: a line each, the spellings of one (an address or number of theirs, too) between semicolons.

    Raises:
      UserError: the file is not there, is not UTF-8, or names nobody.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"privacy.names_file {str(path)!r}: {error}; expected a text file, a name a line") from None
    people = people_of(line for line in lines if not line.lstrip().startswith("#"))
    if not people:
        raise UserError(f"privacy.names_file {str(path)!r} names nobody; expected a name a line")
    return people


def people_of(lines: Iterable[str]) -> list[list[str]]:
    """The spellings of each person, of lines "Jane Doe; J. Doe; jane@acme.com"."""
    split = [[part.strip() for part in line.split(";") if _WORD.search(part)] for line in lines]
    return [spellings for spellings in split if spellings]


def words(name: str) -> list[str]:
    """The words of a name, without what stands between them."""
    return _WORD.findall(name)


# Letters with their marks, which are no \w: accents of their own (NFD, as macOS writes), vowels of Indian scripts.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"[^\W_][{_MARKS}]*(?:[^\W_]|[{_MARKS}])*")
_BETWEEN = re.compile(r"[\s.,'’_\-\u2010-\u2015]{1,3}\s*")
# Blanks and hyphens of typeset texts, for recognizers that know only the plain ones; as long as they were.
_PLAIN = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f"), " ") | dict.fromkeys(map(ord, "\u2010\u2011"), "-")


def _spelled(word: str) -> str:
    return unicodedata.normalize("NFC", word).casefold()


def _reaches(text: str, first: re.Match[str], words: list[str]) -> int:
    """Where the name ends whose first word stands here; 0 where it is not that name."""
    match: re.Match[str] | None = first
    for number, word in enumerate(words):
        if number:
            assert match is not None
            gap = _BETWEEN.match(text, match.end())
            match = gap and _WORD.match(text, gap.end())
        if match is None or _spelled(match[0]) != _spelled(word):
            return 0
        if word[0].isupper() and not match[0][0].isupper():
            return 0
    assert match is not None
    return match.end()


def _has_context(text: str, start: int, context: tuple[str, ...]) -> bool:
    before = re.findall(r"\w+", text[max(0, start - 80) : start].lower())[-_CONTEXT_WORDS:]
    return any(word in one for one in before for word in context)


def _plans(regions: Sequence[str]) -> tuple[str, ...]:
    """The first region of each numbering plan: the United States and Canada have one."""
    import phonenumbers

    first: dict[int, str] = {}
    for region in regions:
        code = phonenumbers.country_code_for_region(region)
        if not code:
            raise UserError(
                f"privacy.phone_regions has {region!r}{nearest(region.upper(), sorted(phonenumbers.SUPPORTED_REGIONS))}; expected "
                "countries by their two capital letters, such as 'US'"
            )
        first.setdefault(code, region)
    return tuple(first.values())


@functools.lru_cache(maxsize=64)
def _made(entity: str, regions: tuple[str, ...]) -> Any:
    kinds = _presidio()
    if entity not in kinds:
        small = [name.lower() for name in kinds] + list(ENTITIES)
        raise UserError(
            f"privacy.kinds has {entity.lower()!r}{nearest(entity.lower(), small)}; known: {', '.join(sorted(ENTITIES))}, {NAME}, "
            f"those of privacy.patterns, and Presidio's: {', '.join(sorted(small)[:90])}"
        )
    if entity == "PHONE_NUMBER":
        return kinds[entity](supported_regions=regions or ("ZZ",))  # of no country: with a country code alone
    return kinds[entity]()


@functools.cache
def _presidio() -> dict[str, Any]:
    """Presidio's recognizers by entity: those that need no model."""
    try:
        import presidio_analyzer
        import tldextract
        from presidio_analyzer import predefined_recognizers as shipped
    except ImportError:
        raise UserError(
            "privacy.enabled=True needs presidio-analyzer: pip install 'jaxtune[privacy]', or set privacy.enabled=False"
        ) from None
    # It logs texts that it could not validate.
    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL)
    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list inside the package: asks no server

    class Email(shipped.EmailRecognizer):  # type: ignore[misc, name-defined]
        """Presidio's, which would fetch a list of domains when first used, and drop those of a company's own network."""

        def validate_result(self, pattern_text: str) -> bool | None:
            return bool(suffixes(pattern_text.rpartition("@")[2]).fqdn) or None  # None: as sure as the pattern

    found: dict[str, Any] = {}
    for name in sorted(dir(shipped)):
        one = getattr(shipped, name)
        if isinstance(one, type) and issubclass(one, presidio_analyzer.PatternRecognizer):
            made: Any = one
            found[made().supported_entities[0]] = made
    return found | {"PHONE_NUMBER": shipped.PhoneRecognizer, "EMAIL_ADDRESS": Email}


# What a recognizer is shown


_OUTSIDE_ADDRESS = re.compile(r"[^!#$%&'*+\-/=?^_`{|}~.@\w]")
_LOCAL, _DOMAIN = 128, 256  # characters that are looked at before and after an @; addresses may have 64 and 255


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    """The runs of characters around each @ that addresses are made of."""
    at, last = text.find("@"), 0
    while at >= 0:
        before = [match.end() for match in _OUTSIDE_ADDRESS.finditer(text, max(last, at - _LOCAL), at)]
        after = _OUTSIDE_ADDRESS.search(text, at)
        start = before[-1] if before else max(last, at - _LOCAL)
        last = min(after.start() if after else len(text), at + _DOMAIN)
        yield start, last
        at = text.find("@", last)


def _around(expression: str, before: int, after: int) -> _Windows:
    """What matches, and so many characters beside it; those that meet are one."""
    compiled = re.compile(expression)

    def windows(text: str) -> Iterator[tuple[int, int]]:
        start, end = -1, -1
        for match in compiled.finditer(text):
            first, last = max(0, match.start() - before), min(len(text), match.end() + after)
            if first > end:
                if start >= 0:
                    yield start, end
                start = first
            end = last
        if start >= 0:
            yield start, end

    return windows


def _addresses_of_hosts(text: str) -> Iterator[tuple[int, int]]:
    for match in _HEX_RUN.finditer(text):
        run = match[0]
        if run.count(".") >= 3 or run.count(":") >= 2:
            yield max(0, match.start() - 8), min(len(text), match.end() + 8)


def _dotted(text: str) -> Iterator[tuple[int, int]]:
    for match in _TOKEN.finditer(text):
        if "." in match[0][1:-1]:
            yield match.span()


def _with_digits(text: str) -> Iterator[tuple[int, int]]:
    if _DIGIT.search(text):
        yield 0, len(text)


_HEX_RUN, _TOKEN, _DIGIT = re.compile(r"[0-9A-Fa-f:.]{3,}"), re.compile(r"\S{4,}"), re.compile(r"\d")
_WINDOWS: dict[str, _Windows] = {
    "EMAIL_ADDRESS": _addresses,
    # Seven digits and more; not after a letter, for such a number is none to phonenumbers either.
    "PHONE_NUMBER": _around(r"(?<![0-9A-Za-z])[+(]{0,2}\d(?:[\s().\-/\u2010-\u2015]{0,3}\d){6,}", 4, 16),
    "CREDIT_CARD": _around(r"\d(?:[- ]?\d){11,}", 1, 1),
    "US_SSN": _around(r"\d(?:[- .]?\d){8,}", 1, 1),
    "IBAN_CODE": _around(r"[A-Z]{2}\d{2}", 1, 48),
    "IP_ADDRESS": _addresses_of_hosts,
    "URL": _dotted,
}
