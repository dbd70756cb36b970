"""Personal data: found with their checksums, replaced consistently and once, before anything sees the row; counted, never shown."""

from __future__ import annotations

import ast
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

import jaxtune
from jaxtune import report, validation
from jaxtune.config import base
from jaxtune.data import privacy, surrogates
from jaxtune.data.formats import read_examples
from jaxtune.data.privacy import Private
from jaxtune.types import UserError

pytest.importorskip("presidio_analyzer", reason="needs jaxtune[privacy]")

KEY = "0123456789abcdef" * 3
LETTER = (
    "Dear Jane Doe (jane@acme.com, JANE DOE, tel. (212) 555-2368): card 4111 1111 1111 1111, IBAN DE89 3704 0044 0532 0130 00, "
    "hosts 8.8.8.8 and 2a00:1450:4001:81b::200e, SSN 457-55-5462; call +44 20 7183 8750."
)
MASKED = "Dear [NAME] ([EMAIL], [NAME], tel. [PHONE]): card [CREDIT_CARD], IBAN [IBAN], hosts [IP] and [IP], SSN [US_SSN]; call [PHONE]."
PEOPLE = ("Jane Doe; J. Doe; jane@acme.com; +1 212 555 2368", "Will Smith")


def made(monkeypatch: pytest.MonkeyPatch | None = None, action: str = "mask", **settings: Any) -> Private:
    section = base().privacy
    section.enabled, section.names = True, PEOPLE
    section.kinds = tuple((kind, action) for kind, _ in section.kinds)
    for name, value in settings.items():
        section[name] = value
    if monkeypatch:
        monkeypatch.setenv("JAXTUNE_PRIVACY_KEY", KEY)
    private = privacy.of(section)
    assert private is not None
    return private


def test_every_kind_is_masked_and_a_masked_text_stays() -> None:
    text, found = made().text(LETTER)
    assert text == MASKED
    assert made().text(text) == (text, ())
    held = [LETTER[f.start : f.start + f.length] for f in found]
    assert held[0] == "Jane Doe"
    assert held[-1] == "+44 20 7183 8750"


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # Luhn
        "IBAN DE88 3704 0044 0532 0130 00",  # mod 97
        "order 457555462",  # nine digits without a word that says what they are
        "will mark go to the doe",  # a listed word with a capital needs one
        "ends at 12:30:45, version 3.11, 300 x 400, on 2002-08-26",
        "a @ b, user@localhost",
    ],
)
def test_what_is_none_is_left(text: str) -> None:
    assert made().text(text) == (text, ())


def test_a_word_of_context_makes_weak_patterns_sure() -> None:
    assert made().text("my social security number: 457555462")[0].endswith("number: [US_SSN]")


def test_addresses_of_a_companys_own_network_are_addresses() -> None:
    assert made().text("jane@mail.corp, jan@old.yu")[0] == "[EMAIL], [EMAIL]"
    assert made(min_score=0.9).text("jane@mail.corp, jan@mail.com")[0] == "jane@mail.corp, [EMAIL]"


def test_finding_asks_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert made().text("to bob@mail.co.uk and https://x.org")[0] == "to [EMAIL] and https://x.org"


def test_one_person_has_one_surrogate_and_another_key_another(monkeypatch: pytest.MonkeyPatch) -> None:
    private = made(monkeypatch, "pseudonym")
    text, _ = private.text(LETTER)
    assert "Jane" not in text
    assert "acme" not in text
    names = [private.text(name)[0] for name in ("Jane Doe", "JANE DOE", "J. Doe", "Jane-Doe")]
    assert len(set(names)) == 1
    phones = [private.text(f"call {number}")[0] for number in ("(212) 555-2368", "+1 212 555 2368", "212.555.2368")]
    assert len(set(phones)) == 1
    # The address and the number are the same person's as the name: one secret for all three.
    digest = private.text("jane@acme.com")[0].removeprefix("person_")[:10]
    number = surrogates.surrogate("email", "", "person:Jane Doe", KEY.encode())
    assert number == f"person_{digest}@example.org"
    assert private.text("JANE@ACME.COM") == (private.text("jane@acme.com")[0], private.text("jane@acme.com")[1])
    monkeypatch.setenv("JAXTUNE_PRIVACY_KEY", KEY[::-1])
    assert made(None, "pseudonym").text("jane@acme.com")[0] != private.text("jane@acme.com")[0]


def test_surrogates_look_like_their_kind_are_nobodys_and_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    private = made(monkeypatch, "pseudonym")
    text, _ = private.text(LETTER)
    assert private.text(text) == (text, ())
    assert made().text(text)[0] != MASKED  # nor does a mask replace a surrogate
    seen = made()
    for number in range(300):
        one = {kind: surrogates.surrogate(kind, "", f"{kind}:{number}", KEY.encode()) for kind in surrogates._MAKERS}
        digits = [int(d) for d in one["credit_card"].replace(" ", "")]
        assert sum(d if place % 2 else (2 * d - 9 * (d > 4)) for place, d in enumerate(digits)) % 10 == 0
        assert int(one["iban"][4:] + "3535" + one["iban"][2:4]) % 97 == 1
        line = "; ".join(value for kind, value in one.items() if kind != "name")
        assert seen.text(line) == (line, ()), line


def test_a_surrogate_name_is_no_listed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(monkeypatch, "pseudonym").text("Will Smith")[0]
    other = made(monkeypatch, "pseudonym", names=(*PEOPLE, first)).text("Will Smith")[0]
    assert other not in (first, "Will Smith")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("_Ann_ said", "_[NAME]_ said"),  # emphasis
        ("see Jose\u0301 and JOS\u00c9", "see [NAME] and [NAME]"),  # the accent a character of its own
        ("प्रिया शर्मा आई", "[NAME] आई"),  # vowels that are marks
        ("Ann\u2010Marie; Ann\n        Marie", "[NAME]; [NAME]"),
        ("Annual, Joanne, ann_x", "Annual, Joanne, ann_x"),
    ],
)
def test_names_as_people_write_them(text: str, masked: str) -> None:
    private = made(names=("Ann", "José", "प्रिया शर्मा", "Ann-Marie"))
    assert private.text(text)[0] == masked
    assert private.text(masked) == (masked, ())


def test_spellings_of_a_name_with_accents_are_one_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    private = made(monkeypatch, "pseudonym", names=("Jos\u00e9; jo@x.org",))
    assert private.text("Jose\u0301")[0] == private.text("Jos\u00e9")[0] != "Jos\u00e9"


def test_numbers_set_with_blanks_that_do_not_break() -> None:
    text = "IBAN DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000, card 4111\u202f1111\u202f1111\u202f1111, call (212)\u00a0555\u20112368"
    assert made().text(text)[0] == "IBAN [IBAN], card [CREDIT_CARD], call [PHONE]"


def test_json_stays_json() -> None:
    arguments = '{"phone": 2125552368, "to": ["jane@acme.com", 3]}'
    row, found = made().row({"calls": [{"function": {"name": "call", "arguments": arguments}}]})
    assert json.loads(row["calls"][0]["function"]["arguments"]) == {"phone": "[PHONE]", "to": ["[EMAIL]", 3]}
    assert [arguments[f.start : f.start + f.length] for f in found] == ["2125552368", "jane@acme.com"]
    assert made().row(row) == (row, ())


def test_without_regions_numbers_with_a_country_code_are_found() -> None:
    assert made(phone_regions=()).text("call +1 212 555 2368 or (212) 555-2368")[0] == "call [PHONE] or (212) 555-2368"


def test_names_are_found_beside_a_pattern_of_that_kind() -> None:
    assert made(patterns=(("name", r"Mr \w+"),)).text("Mr Roe and Jane Doe")[0] == "[NAME] and [NAME]"


def test_overlapping_findings_are_one_and_kept_ones_hide_nothing() -> None:
    settings = {"kinds": (("email", "mask"), ("url", "mask"), ("name", "mask"), ("ticket", "mask"))}
    private = made(patterns=(("ticket", r"ticket \S+"),), **settings)
    text, found = private.text("see https://x.org/?who=jane@acme.com, ticket jane@acme.com")
    assert text == "see [EMAIL] [TICKET]"  # the comma is the URL's
    assert len(found) == 2
    for kinds in (settings["kinds"], tuple(reversed(settings["kinds"]))):
        assert made(patterns=(("ticket", r"ticket \S+"),), kinds=kinds).text("ticket jane@acme.com") == private.text(
            "ticket jane@acme.com"
        )
    kept = made(kinds=(("url", "keep"), ("email", "mask")))
    text, found = kept.text("https://x.org/?who=jane@acme.com and https://y.org/a")
    assert "jane" not in text
    assert text.endswith("https://y.org/a")
    assert [(f.kind, f.action) for f in found] == [("email", "mask"), ("url", "keep")]


def test_positions_are_those_of_the_row_when_a_second_look_finds_more() -> None:
    # "@" after the mask is gone from the word before the number: only then is it of the five words that may say what it is.
    text = "ssn of the one jane.ann.doe@acme.com 457555462"
    made_text, found = made().text(text)
    assert made_text == "ssn of the one [EMAIL] [US_SSN]"
    assert text[found[-1].start :][: found[-1].length] == "457555462"


def test_rows_of_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "messages": [{"role": "user", "content": "I am Jane Doe"}, {"role": "assistant", "content": "Hello", "weight": 1}],
        "tools": [{"function": {"arguments": '{"to": "jane@acme.com"}'}}], "phone": 12125552368, "age": 41, "label": "Will Smith", "none": None,
        "cut": 1.5, "yes": True,
    }  # fmt: skip
    given = json.dumps(row)
    new, found = made(skip_columns=("label",)).row(row)
    assert json.dumps(row) == given  # the row itself is as it was
    assert new["messages"][0] == {"role": "user", "content": "I am [NAME]"}
    assert json.loads(new["tools"][0]["function"]["arguments"]) == {"to": "[EMAIL]"}
    assert new["phone"] == "[PHONE]"
    assert {name: new[name] for name in ("age", "label", "none", "cut", "yes")} == {
        name: row[name] for name in ("age", "label", "none", "cut", "yes")
    }
    assert [f.field for f in found] == ["messages[0].content", "tools[0].function.arguments", "phone"]
    plain = {"text": "nothing here"}
    assert made().row(plain)[0] is plain


def test_examples_are_private_but_split_as_before(tmp_path: Path, data: ConfigDict) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"mail from p{i}@acme.com", "completion": "ok", "who": f"p{i}@acme.com"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.split_key = "who"
    open_ones, _ = read_examples(file, data, keep_rows=True)
    hidden, _ = read_examples(file, data, keep_rows=True, private=made())
    assert [e.split_key for e in hidden] == [e.split_key for e in open_ones]  # else all of them were one group
    assert "acme" not in json.dumps([e._replace(split_key="")[:-1] for e in hidden], default=str)
    assert [len(e.personal) for e in hidden] == [2] * 20
    assert all(not e.personal for e in open_ones)


def test_counts_and_table_hold_no_text() -> None:
    rows = [made().text(text)[1] for text in (LETTER, "none", "jane@acme.com")]
    counts = privacy.counts(rows)
    assert counts["rows"] == 2
    assert counts["found"]["email"] == {"masked": 2}
    assert privacy.told(counts).startswith("1 credit_card masked, 2 email masked")
    table = privacy.table([("train", f"f:{i}", found) for i, found in enumerate(rows)])
    assert table.splitlines()[1] == "train,f:0,text,name,mask,5,8"
    assert "acme" not in table
    assert privacy.told(privacy.counts([()])) == "none found"


def test_the_key_is_made_for_its_owner_alone_and_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXTUNE_PRIVACY_KEY", raising=False)
    file = tmp_path / "keys" / "privacy.key"
    private = made(action="pseudonym", key_file=str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = file.read_text().strip()
    assert len(key) == 64
    assert list(file.parent.iterdir()) == [file]
    assert made(action="pseudonym", key_file=str(file)).text("jane@acme.com") == private.text("jane@acme.com")
    assert key not in repr(private)
    assert key not in repr(private.text("jane@acme.com"))
    os.chmod(file, 0o644)
    with pytest.raises(UserError, match="may be read by others.*chmod 600"):
        made(action="pseudonym", key_file=str(file))
    os.chmod(file, 0o600)
    file.write_text("short")
    with pytest.raises(UserError, match="holds 5 characters") as caught:
        made(action="pseudonym", key_file=str(file))
    assert "short" not in str(caught.value)
    with pytest.raises(UserError, match="surrogates need a key"):
        made(action="pseudonym")


def test_a_key_is_the_same_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    key = surrogates.key(str(file), "")
    monkeypatch.setenv("KEY", file.read_text())  # with the end of its line
    assert surrogates.key("", "KEY") == key
    monkeypatch.setenv("KEY", " " * 40)
    with pytest.raises(UserError, match="surrogates need a key"):
        surrogates.key("", "KEY")


def test_names_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "people.txt"
    file.write_text("\ufeff# our clients\nAnn-Marie O'Neill; A. O'Neill\n\nŁukasz Żak\n", "utf-8")
    private = made(names=(), names_file=str(file))
    assert private.text("Ann Marie O’Neill, ANN-MARIE O'NEILL, A. O'Neill and Łukasz Żak; ann marie")[0] == (
        "[NAME], [NAME], [NAME] and [NAME]; ann marie"
    )
    file.write_text("# nobody\n")
    with pytest.raises(UserError, match="names nobody"):
        made(names_file=str(file))
    config = base()
    config.privacy.names = PEOPLE
    assert "Jane" not in json.dumps(privacy.without_names(config.to_dict()), default=str)
    once = privacy.without_names(config.to_dict())
    assert privacy.without_names(once) == once
    report.write(tmp_path, {"name": "x", "config": config.to_dict()})  # whoever writes one
    assert all("Jane" not in file.read_text() for file in tmp_path.glob("report.*"))


def test_kinds_of_other_countries_and_what_is_unknown() -> None:
    assert (
        made(kinds=(("uk_nhs", "mask"),), names=()).text("NHS 943 476 5919, or 943 476 5918")[0]
        == "NHS [UK_NHS], or 943 476 5918"
    )
    with pytest.raises(UserError, match="did you mean 'email'"):
        made(kinds=(("emial", "mask"),), names=())
    with pytest.raises(UserError, match="phone_regions has 'UK'"):
        made(phone_regions=("UK",))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("kinds", (("email", "hide"),), "expected keep, mask, pseudonym"),
        ("kinds", (("email",),), r"expected \(kind, action\)"),
        ("kinds", (("email", "mask"), ("email", "keep")), "twice"),
        ("kinds", (("email", "mask"),), "does not say what becomes of them"),
        ("patterns", (("ticket", "("),), "not a regular expression"),
        ("patterns", (("Ticket", "x"),), "small letters"),
        ("min_score", 0.0, "above 0"),
        ("names", ("",), "expected texts"),
    ],
)
def test_settings_are_checked(field: str, value: Any, said: str) -> None:
    config = base()
    config.privacy.enabled, config.privacy.names = True, PEOPLE
    config.privacy[field] = value
    with pytest.raises(UserError, match=said):
        validation.validate(config)


@pytest.mark.parametrize(
    "glued",
    [
        ".x.y@mail.co.uk\u00e9+1 212 555 2368x.y@mail.co.uk",
        "C-123456x.y@mail.co.uk2001:4860:4860::8888[EMAIL]8.8.8.8.",
        "jane@acme.com_x.y@mail.co.ukx.y@mail.co.uk_",
    ],
)
def test_data_that_are_glued_together_end(glued: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A surrogate against other words may be taken for data again: replaced for ever, it would hang a run."""
    private = made(monkeypatch, "pseudonym")
    text, found = private.text(glued)
    assert found
    assert "mail.co.uk" not in text
    assert private.text(text)[0] == private.text(private.text(text)[0])[0]


def test_whoever_reads_rows_says_whether_they_are_private() -> None:
    """A new caller that forgets `private=` would show models and people what the config says they must not see."""
    forgotten = []
    for path in Path(jaxtune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            place = {"read_examples": 5, "formats.read_examples": 5, "pipeline.load": 7, "to_examples": 6}.get(name)
            if place and not any(k.arg == "private" for k in node.keywords) and len(node.args) <= place:
                forgotten.append(f"{path.name}:{node.lineno} {name}")
    assert not forgotten
