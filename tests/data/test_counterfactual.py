"""Words of groups exchanged: case and inflection stay, what is not sure is left alone, and lists that make no sense are refused."""

from __future__ import annotations

from typing import Any

import pytest

from jaxtune.data import counterfactual
from jaxtune.data.counterfactual import Axis
from jaxtune.types import UserError

GENDER = (
    ("male", ("he", "him", "his", "his", "himself", "man", "husband", "boy")),
    ("female", ("she", "her", "her", "hers", "herself", "woman", "wife", "girl")),
)
NAMES = (("english", ("Mark", "Emily")), ("arabic", ("Omar", "Layla")), ("nigerian", ("Chidi", "Ngozi")))
AXES = counterfactual.read_axes((("gender", GENDER), ("names", NAMES)))


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("He said HE would; he's late.", "She said SHE would; she's late."),
        ("I saw her in town.", "I saw him in town."),
        ("Her phone is hers.", "His phone is his."),
        ("A friend of his, and his phone.", "A friend of hers, and her phone."),
        ("That is his", "That is hers"),
        ("HER PHONE", "HIS PHONE"),
        ("She lost her\nphone, and her\n  keys", "He lost his\nphone, and his\n  keys"),  # broken by a line's width
        ("I saw her\n\nBye", "I saw him\n\nBye"),
        ("He loved her since 1990, not her family", "She loved him since 1990, not his family"),
        ("Two men and their wives' boys", "Two women and their husbands' girls"),
        ("She hurt herself; the woman's wife", "He hurt himself; the man's husband"),
        ("a man-made theme for the sherpa, shed and Norman", "a man-made theme for the sherpa, shed and Norman"),
    ],
)
def test_case_inflection_and_pronouns(text: str, swapped: str) -> None:
    made = counterfactual.swap(text, AXES["gender"])
    assert (made.text, made.unsure) == (swapped, "")
    assert (made.changed > 0) == (text != swapped)


@pytest.mark.parametrize(
    "text",
    [
        "gave her money to spend",
        "took her back",
        "I like her — now",
        "his all too human ways",
        "thanked her warmly",
        "saw her\nThanks",
    ],
)
def test_a_word_that_may_be_two_leaves_the_text_as_it_was(text: str) -> None:
    made = counterfactual.swap(text + ", he said", AXES["gender"])
    assert made.text == text + ", he said"
    assert made.changed == 0
    assert made.unsure in ("her", "his")


def test_an_unknown_word_with_two_partners_is_unsure_too() -> None:
    axis = counterfactual.read_axes((("kin", (("a", ("uncle", "cousin")), ("b", ("aunt", "aunt")))),))["kin"]
    assert counterfactual.swap("my uncle", axis).text == "my aunt"
    assert counterfactual.swap("my aunt", axis).unsure == "aunt"


def test_names_are_found_as_they_are_written() -> None:
    axis = AXES["names"]
    assert counterfactual.swap("Mark left a mark on EMILY's car", axis, 0, 2).text == "Chidi left a mark on NGOZI's car"
    assert counterfactual.swap("Omar", axis, 0, 2).changed == 0  # a group that is not of this pair
    assert list(axis.pairs()) == [(0, 1), (0, 2), (1, 2)]


def test_swapping_twice_gives_the_text_back() -> None:
    text = "He sold his house, the boy saw her there, and she asked the man himself."
    once = counterfactual.swap(text, AXES["gender"])
    assert once.found == {"male", "female"}
    assert counterfactual.swap(once.text, AXES["gender"]).text == text


def test_rows_are_swapped_at_any_depth_but_for_what_is_kept() -> None:
    row = {
        "id": "he", "label": "he", "n": 3, "text": "he",
        "messages": [{"role": "user", "content": "is he here?"}, {"role": "assistant", "content": "He is."}],
    }  # fmt: skip
    made, told = counterfactual.swap_row(row, AXES["gender"], 0, 1, keep=("label",))
    assert made == {
        "id": "he", "label": "he", "n": 3, "text": "she",
        "messages": [{"role": "user", "content": "is she here?"}, {"role": "assistant", "content": "She is."}],
    }  # fmt: skip
    assert told.changed == 3
    assert row["text"] == "he"
    only, _ = counterfactual.swap_row(row, AXES["gender"], 0, 1, columns=("text",))
    assert (only["text"], only["messages"]) == ("she", row["messages"])
    both = {"a": "he", "b": "gave her money"}
    assert counterfactual.swap_row(both, AXES["gender"], 0, 1)[0] == both  # one undecided word leaves the whole row out


def test_augmented_rows_keep_their_labels_and_are_all_there() -> None:
    rows = [
        ("r1", {"text": "he is good", "label": "pos"}),
        ("r2", {"text": "gave her money", "label": "neg"}),
        ("r3", {"text": "fine", "label": "pos"}),
    ]
    templates = counterfactual.check_templates((("text", "{names} writes: {text}"),), AXES)
    made, counts = counterfactual.augmented(rows, [AXES["gender"]], templates, keep=("label",))
    assert counts == {"original": 3, "swapped": 1, "framed": 9, "unsure": 1}
    assert made[:2] == [rows[0][1], {"text": "she is good", "label": "pos"}]
    assert [row["label"] for row in made] == ["pos"] * 5 + ["neg"] * 4 + ["pos"] * 4
    framed = [row["text"] for row in made[2:5]]
    place = next(at for at, name in enumerate(NAMES[0][1]) if framed[0].startswith(name))
    assert framed == [f"{words[place]} writes: he is good" for _, words in NAMES]  # the same place of each list


BAD: list[tuple[Any, str]] = [
    ((("gender", GENDER), ("gender", GENDER)), "'gender' twice"),
    ((("gender", GENDER[:1]),), "two or more"),
    ((("g", (("a", ("x",)), ("a", ("y",)))),), "none twice"),
    ((("g", (("a", ("x", "z")), ("b", ("y",)))),), "as many in each"),
    ((("g", (("a", ()), ("b", ()))),), "as many in each"),
    ((("g", (("a", ("x",)), ("b", ("X",)))),), "would change nothing"),
    ((("g", (("a", ("x",)), ("b", (" ",)))),), "expected a text"),
    (("gender",), "expected \\(axis"),
]


@pytest.mark.parametrize(("groups", "told"), BAD)
def test_lists_that_make_no_sense_are_refused(groups: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        counterfactual.read_axes(groups)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{nams} writes: {text}", "'nams', which is no axis.*did you mean 'names'"),
        ("{names} writes", "expected {text} and one axis"),
        ("{names} and {gender}: {text}", "one axis"),
    ],
)
def test_templates_name_one_axis(template: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        counterfactual.check_templates((("text", template),), AXES)


def test_unknown_axes_and_columns_are_told_with_what_there_is() -> None:
    with pytest.raises(UserError, match="'gendre'.*did you mean 'gender'"):
        counterfactual.pick(AXES, ("gendre",))
    assert counterfactual.pick(AXES, ()) == list(AXES.values())
    with pytest.raises(UserError, match="'txt', which is no text.*did you mean 'text'"):
        counterfactual.check_column({"text": "a"}, "txt", "audit.columns")


def test_a_name_of_two_words_may_be_broken_over_lines() -> None:
    axis = counterfactual.read_axes((("who", (("a", ("African American", "German")), ("b", ("white man", "Turk")))),))[
        "who"
    ]
    assert counterfactual.swap("an African\nAmerican and Germans", axis).text == "an white man and Turks"


def test_plurals() -> None:
    words = "man wife lady boss boy child Christian church German human fisherman".split()
    assert [
        counterfactual.plural(word) for word in words
    ] == "men wives ladies bosses boys children Christians churches Germans humans fishermen".split()
    assert isinstance(AXES["gender"], Axis)
