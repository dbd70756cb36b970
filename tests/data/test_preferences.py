"""Rows that compare answers: every known shape, what is left out and why, how a row is laid out, cut and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import config as config_lib
from jaxtune.data import formats, pipeline, preferences
from jaxtune.data.batches import eval_batches
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import BRANCH_BITS, UserError

USER, GOOD, BAD = {"role": "user", "content": "who sat"}, "the cat", "the dog on the hill"


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


@pytest.fixture
def data() -> ConfigDict:
    data = config_lib.base().data
    data.max_length = 64
    return data


def read(rows: list[dict[str, Any]], data: ConfigDict, answers: bool = True) -> tuple[list[formats.Example], Any]:
    return formats.to_examples(enumerate(rows, 1), "rows.jsonl", data, answers)


def tokenised(rows: list[dict[str, Any]], data: ConfigDict, tokenizer: Tokenizer, reader: Reader) -> pipeline.Rows:
    return preferences.tokenize(read(rows, data)[0], tokenizer, data, pipeline.silent, "", reader)


SHAPES = {
    "TRL texts": {"prompt": "who sat", "chosen": GOOD, "rejected": BAD},
    "TRL messages": {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "whole chats": {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "whole chats beside their prompt": {"prompt": "who sat", "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "messages and texts": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "OpenAI": {"input": {"messages": [USER]}, "preferred_output": [said(GOOD)], "non_preferred_output": [said(BAD)]},
    "rated": {"prompt": "who sat", "completions": ["a mat", BAD, GOOD], "scores": [2, 0.5, 3]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_row(shape: str, data: ConfigDict, tokenizer: Tokenizer) -> None:
    example = read([SHAPES[shape]], data)[0][0]
    found = preferences.encode(example, Reader("pairs"), tokenizer, data)
    assert isinstance(found, preferences.Answers)
    prompt = tokenizer.decode(found.prompt, skip_special=False)
    assert prompt == "<|im_start|>user\nwho sat<|im_end|>\n<|im_start|>assistant\n"
    whole = [tokenizer.decode(one, skip_special=False) for one in found.completions]
    assert whole == [GOOD + "<|im_end|>", BAD + "<|im_end|>"]
    assert example.margin == (2.5 if shape == "rated" else 0)
    alone = read([SHAPES[shape]], data, answers=False)[0][0]
    assert alone.messages == (USER,), "without answers the row is its prompt"


def test_texts_without_a_prompt_part_where_they_differ(data: ConfigDict) -> None:
    data.chat = False
    example = read([{"chosen": "Q: who? A: a cat", "rejected": "Q: who? A: a car"}], data)[0][0]
    assert [(one.prompt, one.answer) for one in example.branches] == [
        ("Q: who? A: a ca", "t"),
        ("Q: who? A: a ca", "r"),
    ]
    example = read([{"chosen": "Q: who? A: cat", "rejected": "Q: who? A: dog"}], data)[0][0]
    assert [(one.prompt, one.answer) for one in example.branches] == [("Q: who? A:", " cat"), ("Q: who? A:", " dog")]


def test_what_teaches_nothing_is_counted(data: ConfigDict, tokenizer: Tokenizer) -> None:
    good = SHAPES["TRL texts"]
    rows = [
        good,
        {**good, "chosen": BAD + " "},
        {**good, "rejected": "  "},
        {**good, "chosen": [said("")], "rejected": [said(BAD)]},
    ]
    examples, dropped = read(rows, data)
    assert (len(examples), dict(dropped)) == (1, {"chosen_equals_rejected": 1, "empty_completion": 2})
    data.max_length = 60
    long = {**good, "prompt": " ".join(["cat"] * 80)}
    for choice, kept in (("truncate", 2), ("drop", 1)):
        data.too_long = choice
        rows_ = tokenised([good, long], data, tokenizer, Reader("pairs", share=True))
        assert (len(rows_), rows_.counts["prompt_over_window"]) == (kept, 1)
        assert rows_.lengths.max() <= 60
    data.too_long = "error"
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: .* tokens of prompt and answers; expected at most data\.max_length=60"
    ):
        tokenised([good, long], data, tokenizer, Reader("pairs", share=True))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": GOOD, "rejected": [said(BAD)]}, "one answer is a text and the other is messages"),
        ({"chosen": [said(GOOD)], "rejected": [said(BAD)]}, "no 'prompt', and the answers do not begin with one"),
        ({"prompt": "who", "chosen": GOOD, "rejected": 3}, "field 'rejected' is 3; expected a text or a list of messages"),
        ({"prompt": "who", "chosen": GOOD, "rejected": BAD, "margin": "much"}, "field 'margin' is 'much'; expected a number"),
        ({"prompt": "who", "completions": [GOOD, BAD], "scores": [1]}, "expected two lists of one length"),
        ({"input": {"messages": "who"}, "preferred_output": [said(GOOD)], "non_preferred_output": [said(BAD)]}, r"field 'input\.messages'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row: dict[str, Any], says: str, data: ConfigDict) -> None:
    with pytest.raises(UserError, match=rf"^rows\.jsonl:1: .*{says}"):
        read([row], data)


@pytest.mark.parametrize("share", [True, False])
def test_a_row_is_laid_out_in_branches(share: bool, data: ConfigDict, tokenizer: Tokenizer) -> None:
    """Each branch, its prompt before it, reads as the whole chat; every trained token is predicted from the one before it."""
    rows = tokenised([SHAPES["TRL texts"], SHAPES["rated"]], data, tokenizer, Reader("pairs", share=share))
    batch = {name: value[0] for name, value in next(eval_batches(rows, 128, True, 1, 0)).items()}
    segments, text = batch["segment_ids_BT"], "<|im_start|>user\nwho sat<|im_end|>\n<|im_start|>assistant\n"
    for number in (1, 2):
        for branch, answer in ((1, GOOD), (2, BAD)):
            own = segments == (number | branch << BRANCH_BITS)
            at = np.flatnonzero((segments == number) | own)
            assert tokenizer.decode(batch["tokens_BT"][at], skip_special=False) == text + answer + "<|im_end|>"
            np.testing.assert_array_equal(batch["positions_BT"][at], np.arange(len(at)))
            trained = np.flatnonzero(own & (batch["weights_BT"] != 0))
            np.testing.assert_array_equal(batch["targets_BT"][trained], batch["tokens_BT"][trained + 1])
            assert tokenizer.decode(batch["targets_BT"][trained], skip_special=False) == answer + "<|im_end|>"
    assert (segments == 1).any() == share
    assert rows.counts["tokens"] == len(rows.tokens) == (segments != 0).sum()


def test_cutting_takes_the_prompts_first_and_then_the_answers_last_tokens() -> None:
    def answers(prompt: int, *completions: int) -> preferences.Answers:
        parts = tuple(np.arange(n, dtype=np.int32) for n in completions)
        return preferences.Answers(
            np.arange(prompt, dtype=np.int32), (1, 2), parts, tuple(np.ones(n, "f") for n in completions)
        )

    for share in (True, False):
        for prompt, one, other in ((40, 5, 9), (3, 40, 2), (30, 30, 30), (0, 30, 30), (1, 1, 60)):
            whole = answers(prompt, one, other)
            apart = whole.apart(24)
            assert all(len(apart.prompt) + len(part) <= 24 for part in apart.completions)
            cut = whole.cut(24, share)
            assert cut.length(share) <= 24
            assert len(cut.laid_out(share)[0]) == cut.length(share)
            assert all(len(part) >= 1 for part in cut.completions)
            if prompt:
                assert cut.prompt[-1] == prompt - 1
            if prompt == 40:
                assert (len(cut.completions[0]), len(cut.completions[1])) == (
                    (5, 9) if share or len(cut.prompt) > 1 else (5, 9)
                )
                assert whole.length(share) - cut.length(share) >= 1


def test_judged_answers_meet_anothers_prompt(data: ConfigDict, tokenizer: Tokenizer) -> None:
    """KTO's rows: pairs are two, a label says which branch, and each group's answers are handed round."""
    rows = [{"prompt": "who", "completion": f"{word} cat", "label": label} for word, label in
            (("a", True), ("the", "false"), ("red", 1), ("blue", "0"))]  # fmt: skip
    found = tokenised(rows, data, tokenizer, Reader("judged", share=True, group=2))
    batches = list(eval_batches(found, 64, False, 1, 0))
    said_by = []
    for batch in batches:
        branch = batch["segment_ids_BT"][0] >> BRANCH_BITS
        said_by.append(
            {
                int(b): tokenizer.decode(batch["targets_BT"][0][(branch == b) & (batch["weights_BT"][0] != 0)])
                for b in set(branch) - {0}
            }
        )
    assert said_by == [
        {1: "a cat", 3: "the cat"}, {2: "the cat", 3: "a cat"}, {1: "red cat", 3: "blue cat"}, {2: "blue cat", 3: "red cat"},
    ]  # fmt: skip
    pairs = tokenised([SHAPES["TRL texts"]], data, tokenizer, Reader("judged", share=True, group=2))
    assert len(pairs) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*a 'label' of true or false"):
        tokenised([{"prompt": "who", "completion": "a cat"}], data, tokenizer, Reader("judged", group=2))


@pytest.mark.parametrize("group", [6, 5])
def test_answers_of_one_prompt_meet_those_of_others(group: int, data: ConfigDict, tokenizer: Tokenizer) -> None:
    """Pairs taken apart: no answer counts as a stranger to its own prompt, and good and bad ones are handed round alike."""
    prompts = ["who sat", "what ran", "where is the cat"]
    rows = [{"prompt": prompt, "chosen": f"{i} good", "rejected": f"{i} bad"} for i, prompt in enumerate(prompts)]
    found, given = tokenised(rows, data, tokenizer, Reader("judged", share=True, group=group)), []
    for batch in eval_batches(found, 64, False, 1, 0):
        branch, trained = batch["segment_ids_BT"][0] >> BRANCH_BITS, batch["weights_BT"][0] != 0
        own, other = (
            tokenizer.decode(batch["targets_BT"][0][trained & at]) for at in ((branch > 0) & (branch < 3), branch == 3)
        )
        assert own[0] != other[0]
        given.append(other.split()[1])
    assert len(given) == 6
    assert group != 6 or sorted(given) == ["bad"] * 3 + ["good"] * 3


def test_a_reward_is_read_at_the_last_token_of_each_answer(data: ConfigDict, tokenizer: Tokenizer) -> None:
    row = {**SHAPES["TRL texts"], "margin": 0.25}
    rows = tokenised([row], data, tokenizer, Reader("rewards", pool="last", share=True))
    batch = next(eval_batches(rows, 64, True, 1, 0))
    at = np.flatnonzero(batch["weights_BT"][0])
    assert [tokenizer.decode_token(int(token)) for token in batch["tokens_BT"][0][at]] == ["<|im_end|>"] * 2
    np.testing.assert_array_equal(batch["scores_BTC"][0, at, 0], 0.25)
