"""Pairs of texts: how rows become queries and passages, what is cut and counted, and the batches of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import base
from jaxtune.data import pairs, pipeline
from jaxtune.data.batches import BatchSource, eval_batches
from jaxtune.data.formats import to_examples
from jaxtune.types import UserError
from tests.data.conftest import make_tokenizer


def examples_of(rows, **settings):
    data = base().data
    data.update(settings)
    return to_examples(list(enumerate(rows, 1)), "rows.jsonl", data)[0]


def rows_of(rows, **settings):
    data = base().data
    data.update(settings)
    return pairs.tokenize(examples_of(rows, **settings), make_tokenizer(None), data, pipeline.silent)


@pytest.mark.parametrize(
    "names", [("query", "positive"), ("anchor", "positive"), ("question", "context"), ("sentence1", "sentence2")]
)
def test_pairs_are_known_by_their_names(names):
    (example,) = examples_of([{names[0]: " who sat ", names[1]: "the cat"}])
    assert (example.is_pair, example.prompt, example.answer, example.negative) == (True, "who sat", "the cat", "")


def test_templates_say_what_is_the_query_the_passage_and_the_negative():
    settings = {"prompt": "query: {q}", "passage": "passage: {title}. {text}", "negative": "passage: {bad}"}
    (example,) = examples_of([{"q": "who", "title": "Cats", "text": "the cat", "bad": "a dog"}], **settings)
    assert (example.prompt, example.answer) == ("query: who", "passage: Cats. the cat")
    assert example.negative == "passage: a dog"
    assert [pairs.prefix(t) for t in ("query: {q}", "{q}", "", "{q}?", "{a} {b}")] == ["query: ", "", "", "", ""]


def test_a_negative_that_nothing_uses_and_an_empty_text_are_refused():
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*data.negative='\{negative\}'"):
        examples_of([{"anchor": "a", "positive": "b", "negative": "c"}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: the passage is empty"):
        examples_of([{"query": "a", "passage": "b"}, {"query": "a", "passage": " "}])


def test_equal_texts_are_one_and_have_one_number():
    rows = rows_of(
        [{"q": "who", "p": "the cat", "n": "a dog"}, {"q": "what", "p": "the cat", "n": ""}, {"q": "who", "p": "a dog", "n": "the mat"}],
        prompt="{q}", passage="{p}", negative="{n}",
    )  # fmt: skip
    assert rows.passages.of_row_MQ.tolist() == [[0, 1], [0, -1], [1, 2]]
    assert rows.passages.query_ids_M.tolist() == [0, 1, 0]
    assert (rows.counts["rows"], rows.counts["passages"], rows.counts["trained_tokens"]) == (3, 3, 3)
    assert rows.digest != rows_of([{"q": "who", "p": "the cat", "n": ""}], prompt="{q}", passage="{p}").digest


def test_a_cut_text_keeps_the_token_that_closes_it_and_is_counted():
    tokenizer = make_tokenizer(None)
    ids, cut = pairs.encode("the cat sat on the mat" * 3 + "</s>", tokenizer, 6)
    assert cut
    assert len(ids) == 6
    assert tokenizer.decode(ids, skip_special=False).endswith("</s>")
    whole = tokenizer.encode_whole("the cat sat on the mat " * 3)
    assert pairs.encode("the cat sat on the mat " * 3, tokenizer, 6) == (whole[:6], True)
    short, long = {"query": "who", "passage": "cat"}, {"query": "who", "passage": "the cat sat on the mat " * 9}
    assert rows_of([short, long], max_passage_length=8).counts["truncated"] == 1
    dropped = rows_of([short, long], max_passage_length=8, too_long="drop")
    assert (dropped.counts["too_long"], dropped.row_ids) == (1, ["rows.jsonl:1"])
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*data.max_passage_length=8"):
        rows_of([short, long], max_passage_length=8, too_long="error")


def test_batches_hold_each_query_beside_its_passages():
    rows = [{"query": f"who {n}", "passage": "cat " * (n + 1)} for n in range(5)]
    made, tokenizer = rows_of(rows, max_passage_length=12), make_tokenizer(None)
    source = BatchSource(made, 16, True, True, 0, 4, tokenizer.pad_id)
    assert source.num_bins == 5, "pairs are never packed, whatever data.packing says"
    batch = source[3]
    assert {"passage_tokens_BQU": (4, 1, 12), "passage_ids_BQ": (4, 1), "query_ids_B": (4,)}.items() <= {
        name: array.shape for name, array in batch.items()
    }.items()
    for b in range(4):
        row = rows[batch["query_ids_B"][b]]
        tokens = batch["passage_tokens_BQU"][b, 0][batch["passage_segment_ids_BQU"][b, 0] != 0]
        assert tokenizer.decode(tokens) == row["passage"].strip()
        assert tokenizer.decode(batch["tokens_BT"][b][batch["segment_ids_BT"][b] != 0]) == row["query"]
    np.testing.assert_array_equal(batch["weights_BT"].sum(1), 1)
    np.testing.assert_array_equal(
        source.local(3, np.array([2]))["passage_tokens_BQU"][0], batch["passage_tokens_BQU"][2]
    )
    last = list(eval_batches(made, 16, True, 4, tokenizer.pad_id))[-1]
    assert last["query_ids_B"].tolist() == [4, -1, -1, -1]
    assert last["weights_BT"].sum() == 1
    assert not last["passage_segment_ids_BQU"][1:].any()


def test_a_passage_is_on_one_side_of_the_split(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"who {n}", "passage": f"cat {n % 20}"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = base().data
    data.split_key, data.test_fraction, data.validation_fraction = "passage", 0.3, 0.2
    splits = pipeline.load(data, {"train": path}, make_tokenizer(None))
    sides = [{example.answer for example in side} for side in splits[:3]]
    assert all(sides)
    assert sum(map(len, sides)) == 20


def test_a_row_that_is_no_pair_is_named():
    with pytest.raises(UserError, match=r"rows.jsonl:1: train.objective='contrastive' needs a query and a passage"):
        pairs.check(examples_of([{"text": "the cat"}]))


def test_mined_negatives_share_words_with_the_query_and_do_not_answer_it():
    passages = ["penguins swim and penguins fly not", "an eagle can fly far", "moss grows on stones"]
    asked = ["can penguins fly", "can eagle fly", "can moss fly", "can penguins fly"]
    rows = [{"query": q, "passage": passages[n]} for q, n in zip(asked, (0, 1, 2, 2), strict=True)]
    of_row_MQ = rows_of(rows, mined_negatives=2).passages.of_row_MQ
    assert of_row_MQ[0].tolist() == [0, 1, -1], "both other passages were looked at, and one answers the same query"
    assert of_row_MQ[1].tolist() == [1, 0, 2]
    assert of_row_MQ[3].tolist() == [2, 1, -1]
