"""The same text about another group: he for she, Anna for Omar. Case, plural and possessive stay as they were.

    audit.groups = (
        ("gender", (("male", ("he", "him", "his", "man")), ("female", ("she", "her", "her", "woman")))),
        ("names", (("english", ("Emily", "Jack")), ("arabic", ("Fatima", "Omar")))),
    )

An axis has two groups or more; words at the same place stand for each other. A word that stands for several (her: him or his)
is decided by what is around it (`_role`), or its row is left out. A word written with a capital is a name: it is found as it
is written, or all in capitals, so that "Mark" is no mark. Words inside others (he in the, man in man-made) are left alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jaxtune.types import UserError, nearest

Row = dict[str, Any]


class Axis(NamedTuple):
    """Groups that are exchanged for each other, and the words of each, place by place."""

    name: str
    groups: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Numbers of each two groups."""
        return ((a, b) for a in range(len(self.groups)) for b in range(a + 1, len(self.groups)))


class Swapped(NamedTuple):
    """A text with two groups' words exchanged. `changed`: how many; `found`: whose words it had; `unsure`: a word left undecided."""

    text: str
    changed: int = 0
    found: frozenset[str] = frozenset()
    unsure: str = ""


def read_axes(groups: Sequence[Any]) -> dict[str, Axis]:
    """Returns the axes of `audit.groups` by name.

    Raises:
      UserError: not of that shape, a name twice, fewer than two groups, lists of unlike length, or a word of two groups.
    """
    axes: dict[str, Axis] = {}
    for one in groups:
        if not _is_pair(one) or not all(_is_pair(group) for group in one[1]):
            raise UserError(f"audit.groups has {one!r:.80}; expected (axis, ((group, (word, …)), (group, (word, …))))")
        name, parts = one
        if name in axes:
            raise UserError(f"audit.groups has the axis {name!r} twice; give each a name of its own")
        axis = Axis(name, tuple(group for group, _ in parts), tuple(tuple(words) for _, words in parts))
        _check(axis)
        axes[name] = axis
    return axes


def _is_pair(one: Any) -> bool:
    return (
        isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], tuple | list)
    )


def _check(axis: Axis) -> None:
    told = f"audit.groups, {axis.name!r}"
    if len(axis.groups) < 2 or len(set(axis.groups)) < len(axis.groups):
        raise UserError(f"{told} has the groups {axis.groups!r}; expected two or more, none twice")
    lengths = {group: len(words) for group, words in zip(axis.groups, axis.words, strict=True)}
    if len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise UserError(
            f"{told} has lists of {lengths} words; expected as many in each, for words at the same place stand for each other"
        )
    owner: dict[str, str] = {}
    for group, words in zip(axis.groups, axis.words, strict=True):
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{told}, {group!r} has the word {word!r}; expected a text")
            if owner.setdefault(word.lower(), group) != group:
                raise UserError(
                    f"{told} has {word!r} in {owner[word.lower()]!r} and in {group!r}: swapping it would change nothing"
                )


def pick(axes: Mapping[str, Axis], names: Sequence[str]) -> list[Axis]:
    """The axes of these names; all where none are named.

    Raises:
      UserError: a name that is none of them.
    """
    for name in names:
        if name not in axes:
            raise UserError(
                f"audit.axes has {name!r}, which audit.groups lacks{nearest(name, list(axes))}; it has {', '.join(axes) or 'none'}"
            )
    return [axes[name] for name in names] if names else list(axes.values())


# ---- texts ----


def swap(text: str, axis: Axis, a: int = 0, b: int = 1) -> Swapped:
    """Returns the text with the words of groups `a` and `b` of the axis in each other's place.

    Where a word cannot be decided the text comes back as it was, with that word as `unsure`.
    """
    pattern, partners = _table(axis, a, b)
    found: set[str] = set()
    unsure, changed = "", 0

    def one(match: re.Match[str]) -> str:
        nonlocal unsure, changed
        form = " ".join(match.group().split())  # a line may break between two words
        known = partners.get(form) or partners.get(form.lower())
        if known is None:  # a name's letters in another case
            return match.group()
        group, options, own = known
        word = options[0] if len(options) == 1 else _role(match, options)
        unsure = unsure or ("" if word else match.group())
        found.add(axis.groups[group])
        changed += 1
        return _cased(match.group(), own, word)

    made = pattern.sub(one, text)
    return Swapped(text, 0, frozenset(found), unsure) if unsure else Swapped(made, changed, frozenset(found))


# form -> (group's number, what stands for it, the word as it was listed)
_Partners = dict[str, tuple[int, tuple[str, ...], str]]


@lru_cache(maxsize=256)
def _table(axis: Axis, a: int, b: int) -> tuple[re.Pattern[str], _Partners]:
    """What to look for, and what stands for each form: words as they are listed, then plurals that are not listed themselves."""
    partners: _Partners = {}
    listed = {word.lower() for words in axis.words for word in words}
    for mine, theirs in ((a, b), (b, a)):
        for word, other in zip(axis.words[mine], axis.words[theirs], strict=True):
            forms = [(word, other)]
            if not {word.lower(), other.lower()} & _NO_PLURAL and plural(word).lower() not in listed:
                forms.append((plural(word), plural(other)))
            for form, partner in forms:
                group, options, own = partners.get(_key(form), (mine, (), form))
                if partner not in options:
                    partners[_key(form)] = (group, (*options, partner), own)
                if form != form.lower():
                    partners[form.upper()] = partners[form]
    forms_by_length = sorted(partners, key=len, reverse=True)
    choices = "|".join(r"\s+".join(map(re.escape, form.split())) for form in forms_by_length)
    return re.compile(rf"(?<!\w)(?<!\w-)(?:{choices})(?!\w)(?!-\w)", re.IGNORECASE), partners


def _key(form: str) -> str:
    return form if form != form.lower() else form.lower()


_NO_MEN = frozenset(
    "german roman human ottoman norman herman shaman brahman turkoman rahman osman usman salman ayman".split()
)  # end in -man, and no man is meant


def plural(word: str) -> str:
    """A noun's plural by English rules, the common ones: man/men, wife/wives, lady/ladies, boss/bosses."""
    if word.lower().rsplit(maxsplit=1)[-1] in _NO_MEN:
        return word + "s"
    for end, others in (("man", "men"), ("child", "children"), ("person", "people"), ("wife", "wives")):
        if word.lower().endswith(end):
            return word[: -len(end)] + others
    if re.search(r"(s|x|z|ch|sh)$", word, re.IGNORECASE):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word, re.IGNORECASE) and word == word.lower() else word + "s"


def _cased(found: str, own: str, word: str) -> str:
    """`word` in the case in which the text had `found`, whose form as listed is `own`."""
    if found.isupper() and len(found) > 1:
        return word.upper()
    if own != own.lower() or not found[:1].isupper():  # a name's capital says nothing of where it stands
        return word
    return word[:1].upper() + word[1:]


_NO_PLURAL = frozenset(
    "he him his himself she her hers herself they them their theirs themself themselves it its itself mr mrs ms miss sir madam men "
    "women people children guys girls boys".split()
)
# After these a pronoun stands alone: "saw her in town", "saw her, then"; "his is better".
_ALONE = frozenset(
    "a an the this that these those and or but nor so if when while because as than then in on at to for from with without by of off up "
    "out over under into onto about after before during through around is are was were be been am has have had do does did will "
    "would can could should may might must not he she it they we i you who which what where how why there here again too also "
    "anymore yesterday today tomorrow tonight since until till although though unless whether not upon toward towards against across".split()
)
# After these, or before those, it may be either: "gave her money", "took her back".
_GIVING = frozenset(
    "give gave given gives giving tell told tells ask asked asks show showed shown shows send sent sends buy bought buys bring brought "
    "make made makes making let lets help helped helps see saw seen sees watch watched hear heard call called offer offered teach taught "
    "get got gets wish wished owe owed lend lent pay paid find found keep kept consider considered name named have had".split()
)
_EITHER = frozenset(
    "all more most much little back home well first last right only just even very really both her his him any some no one".split()
)


_NO_ADVERBS = frozenset(
    "family only elderly reply friendly daily early lovely belly assembly supply ally bully jelly lily fly".split()
)


def _role(match: re.Match[str], options: Sequence[str]) -> str:
    """Decides English `her` (him, his) and `his` (her, hers) by the words around; "" where it is not sure, or another word.

    Before a noun it is the determiner (her phone); before a word that begins no noun phrase, or at the end of a clause, it
    stands alone (saw her in town, a friend of his).
    """
    text, word = match.string, match.group().lower()
    kinds = {"her": ("him", "his"), "his": ("hers", "her")}  # (alone, before a noun)
    if word not in kinds or {*options} != {*kinds[word]}:
        return ""
    alone, determiner = kinds[word]
    # A line that goes on with a small letter was broken by its width.
    following = re.match(r"(?:[ \t]+|[ \t]*\r?\n[ \t]*(?=[a-z]))([A-Za-z]+)", text[match.end() :])
    if following is None:
        plain = re.match(r"[ \t\r]*($|[.,;:!?)\"]|\n\s*($|\n))", text[match.end() :])
        return alone if plain else ""
    after = following.group(1).lower()
    if after in _EITHER or (after.endswith("ly") and after not in _NO_ADVERBS):
        return ""
    if after in _ALONE:
        return alone
    before = re.search(r"([A-Za-z]+)[ \t]+$", text[: match.start()])
    if word == "her" and before and before.group(1).lower() in _GIVING:
        return ""
    return determiner


# ---- rows ----


def swap_row(
    row: Row, axis: Axis, a: int, b: int, columns: Sequence[str] = (), keep: Sequence[str] = ()
) -> tuple[Row, Swapped]:
    """Returns the row with the texts of `columns` (() = all, at any depth) swapped, but for `keep`; and what was changed in all."""
    total = Swapped("")

    def inside(value: Any) -> Any:
        nonlocal total
        if isinstance(value, str):
            made = swap(value, axis, a, b)
            total = Swapped("", total.changed + made.changed, total.found | made.found, total.unsure or made.unsure)
            return made.text
        if isinstance(value, list):
            return [inside(each) for each in value]
        return (
            {key: each if key in _NOT_TEXT else inside(each) for key, each in value.items()}
            if isinstance(value, dict)
            else value
        )

    wanted = columns or tuple(row)
    made = {
        key: inside(value) if key in wanted and key not in (*keep, *_NOT_TEXT) else value for key, value in row.items()
    }
    return (row, total._replace(changed=0)) if total.unsure else (made, total)


_NOT_TEXT = ("role", "from", "id", "row_id", "tool_call_id")  # of messages and rows: names for programs


def framed(row: Row, column: str, template: str, axis: Axis, group: int, row_id: str) -> Row:
    """Returns the row with its `column` as the template says: {text} is what it was, {axis's name} a word of the group.

    Which word is a matter of the row alone, and the same place in the list for each group.
    """
    place = int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=4).digest(), "big") % len(axis.words[group])
    filled = template.replace(f"{{{axis.name}}}", axis.words[group][place]).replace("{text}", str(row[column]))
    return {**row, column: filled}


def check_templates(given: Sequence[Any], axes: Mapping[str, Axis]) -> list[tuple[str, str, Axis]]:
    """Returns (column, template, axis) of each of `audit.templates`.

    Raises:
      UserError: not of that shape, a slot that is no axis, or none.
    """
    found = []
    for one in given:
        if not (isinstance(one, tuple | list) and len(one) == 2 and all(isinstance(part, str) for part in one)):
            raise UserError(f"audit.templates has {one!r:.80}; expected (column, template)")
        column, template = one
        slots = [slot for slot in re.findall(r"\{(\w+)\}", template) if slot != "text"]
        if "{text}" not in template or len(set(slots)) != 1:
            raise UserError(
                f"audit.templates has {template!r}; expected {{text}} and one axis, as in '{{names}} writes: {{text}}'"
            )
        if slots[0] not in axes:
            raise UserError(
                f"audit.templates names {slots[0]!r}, which is no axis of audit.groups{nearest(slots[0], list(axes))}; there are {', '.join(axes) or 'none'}"
            )
        found.append((column, template, axes[slots[0]]))
    return found


def check_column(row: Row, column: str, option: str) -> None:
    """Refuses a column that the rows lack, or that holds no text.

    Raises:
      UserError: with the columns that there are.
    """
    if column not in row or not isinstance(row[column], str):
        raise UserError(
            f"{option} names the column {column!r}, which is no text of the rows{nearest(column, list(row))}; they have {', '.join(map(repr, row))}"
        )


def augmented(
    rows: Sequence[tuple[str, Row]], axes: Sequence[Axis], templates: Sequence[tuple[str, str, Axis]] = (), columns: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> tuple[list[Row], dict[str, int]]:  # fmt: skip
    """Counterfactual augmentation (Lu et al. 2018, arXiv:1807.11714): the rows, and after each the same about other groups, labels unchanged.

    Args:
      rows: (row_id, row).
      axes: whose words are swapped.
      templates: frames that each row is also put into, once for each group, as `check_templates` gives them.
      columns, keep: as `swap_row`.

    Returns:
      the rows; counts of `original`, `swapped`, `framed` and `unsure`.
    """
    made: list[Row] = []
    counts = {"original": len(rows), "swapped": 0, "framed": 0, "unsure": 0}
    for row_id, row in rows:
        made.append(row)
        for axis in axes:
            for a, b in axis.pairs():
                other, told = swap_row(row, axis, a, b, columns, keep)
                counts["unsure"] += bool(told.unsure)
                if told.changed:
                    made.append(other)
                    counts["swapped"] += 1
        for column, template, axis in templates:
            check_column(row, column, "audit.templates")
            made += [framed(row, column, template, axis, group, row_id) for group in range(len(axis.groups))]
            counts["framed"] += len(axis.groups)
    return made, counts
