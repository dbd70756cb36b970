"""Texts to be filled in, classed, rated and tagged: what stands at which token, and what is masked when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune.data import masking, pipeline, readers
from jaxtune.data.formats import Example, to_examples
from jaxtune.data.masking import Masking
from jaxtune.data.pipeline import BatchSource, Rows
from jaxtune.data.readers import Reader
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import UserError

MASK = 399  # beyond what the texts hold
TAGS = ("O", "B-PER", "I-PER", "B-LOC")


def masks(**changes: Any) -> Masking:
    return Masking(MASK, 300, 0.15, 0.8, 0.1, 0)._replace(**changes)


def texts(tokenizer: Tokenizer, data: ConfigDict, lengths: list[int]) -> Rows:
    """Rows of words, one of `lengths` each, every token of which may be masked."""
    examples = [Example(f"f:{i}", text=" ".join(["cat"] * length)) for i, length in enumerate(lengths)]
    return pipeline.tokenize(examples, tokenizer, data, reader=Reader("masked", masking=masks()))


def source(rows: Rows, length: int, **changes: Any) -> BatchSource:
    return BatchSource(rows, length, True, True, 0, 4, 0, masking=masks(**changes))


def test_masks_depend_on_seed_and_row_number_alone(tokenizer_of: Any, data: ConfigDict) -> None:
    rows = texts(tokenizer_of(None), data, [40] * 12)
    batches = source(rows, 100)
    whole = batches[5]
    for row in range(4):  # a host that holds one row makes the same one
        mine = source(rows, 100).local(5, np.array([row]))
        for name, value in whole.items():
            np.testing.assert_array_equal(mine[name][0], value[row])
    other = source(rows, 100, seed=1)[5]
    assert (other["weights_BT"] != whole["weights_BT"]).any()
    later = batches[5 + len(batches.bins) // 4]  # the same rows, an epoch on
    assert (later["weights_BT"] != whole["weights_BT"]).any()


def test_masked_shares_are_berts_in_every_text(tokenizer_of: Any, data: ConfigDict) -> None:
    data.max_length = 700
    rows = texts(tokenizer_of(None), data, [600, 20, 3, 1] * 30)
    clean, seen = BatchSource(rows, 700, True, True, 0, 4, 0), source(rows, 700)
    picked, became_mask, became_other, total = 0, 0, 0, 0
    for step in range(8):
        before, after = clean[step], seen[step]
        np.testing.assert_array_equal(after["targets_BT"], before["tokens_BT"] * (before["segment_ids_BT"] > 0))
        chosen = after["weights_BT"] == 1
        assert not chosen[before["weights_BT"] == 0].any(), "special tokens and padding are never masked"
        np.testing.assert_array_equal(after["tokens_BT"][~chosen], before["tokens_BT"][~chosen])
        for b in range(4):
            for segment in range(1, before["segment_ids_BT"][b].max() + 1):
                mine = (before["segment_ids_BT"][b] == segment) & (before["weights_BT"][b] != 0)
                assert (chosen[b] & mine).sum() == max(1, round(0.15 * mine.sum()))
        now, then = after["tokens_BT"][chosen], before["tokens_BT"][chosen]
        picked, total = picked + chosen.sum(), total + (before["weights_BT"] != 0).sum()
        became_mask += (now == MASK).sum()
        became_other += ((now != MASK) & (now != then)).sum()
    assert 0.14 < picked / total < 0.17
    assert 0.77 < became_mask / picked < 0.83
    assert 0.08 < became_other / picked < 0.12


def test_what_is_measured_is_masked_once_whatever_is_beside_it(tokenizer_of: Any, data: ConfigDict) -> None:
    rows = texts(tokenizer_of(None), data, [30, 12, 7])
    fixed, alone = masking.fixed(rows, masks()), masking.fixed(texts(tokenizer_of(None), data, [30]), masks())
    end = rows.offsets[1]
    np.testing.assert_array_equal(fixed.tokens[:end], alone.tokens)
    np.testing.assert_array_equal(fixed.weights[:end], alone.weights)
    assert masking.num_masked(rows, masks()) == fixed.weights.sum() > 0
    np.testing.assert_array_equal(fixed.targets, rows.tokens)


def test_any_text_can_be_masked(chatml: Tokenizer, data: ConfigDict) -> None:
    reader = Reader("masked", masking=masks())
    chat = Example("f:1", ({"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}))
    joined = Example("f:2", prompt="the cat ", answer="sat")
    for example, text in ((chat, None), (joined, "the cat sat"), (Example("f:3", words=("the", "mat")), "the mat")):
        encoded = readers.encode(example, reader, chatml, data)
        assert text is None or chatml.decode(encoded.tokens) == text
        special = np.isin(encoded.tokens, chatml.special_ids)
        np.testing.assert_array_equal(encoded.weights == 0, special)
        assert special.any() == (text is None)


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_scores_stand_at_the_token_that_is_read(pool: str, tokenizer_of: Any, data: ConfigDict) -> None:
    reader, tokenizer = Reader("labels", ("a", "b", "c"), pool), tokenizer_of(None)
    examples = [
        Example(f"f:{i}", prompt="the cat sat", labels=labels) for i, labels in enumerate([("c", "a"), (), ("b",)])
    ]
    rows = pipeline.tokenize(examples, tokenizer, data, reader=reader)
    np.testing.assert_array_equal(rows.scores_MC, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    batch = next(pipeline.eval_batches(rows, 16, True, 2, 0))
    assert batch["scores_BTC"].shape == (2, 16, 3)
    for row, segment, labels in ((0, 1, [1, 0, 1]), (0, 2, [0, 0, 0]), (0, 3, [0, 1, 0])):
        mine = np.flatnonzero(batch["segment_ids_BT"][row] == segment)
        at = mine[-1 if pool == "last" else 0]
        assert np.flatnonzero(batch["weights_BT"][row, mine]).tolist() == [at - mine[0]]
        np.testing.assert_array_equal(batch["scores_BTC"][row, at], labels)
    assert not batch["scores_BTC"][1].any()


def test_a_changed_answer_changes_the_digest(tokenizer_of: Any, data: ConfigDict) -> None:
    tokenizer, digests = tokenizer_of(None), set()
    for kind, answers in (("label", "ab"), ("number", ("0.5", "0.25"))):
        for answer in answers:
            example = Example("f:1", prompt="the cat", answer=answer)
            digests.add(pipeline.tokenize([example], tokenizer, data, reader=Reader(kind, ("a", "b"))).digest)
    assert len(digests) == 4
    rows = pipeline.tokenize([example], tokenizer, data, reader=Reader("number"))
    assert replace(rows, scores_MC=rows.scores_MC + 1).digest != rows.digest


def test_words_are_found_by_the_characters_of_their_sub_words(chatml: Tokenizer) -> None:
    words = ("the", "unknowable", "cat", "é東", "!")
    ids, found = chatml.encode_words(words)
    assert chatml.decode(ids) == "the unknowable cat é東 !"
    for number, word in enumerate(words):
        assert chatml.decode([i for i, w in zip(ids, found, strict=True) if w == number]).strip() == word
    words_only = [word for word in found if word >= 0]  # a space may be a token of its own, and of no word
    assert words_only == sorted(words_only)
    assert found.count(1) > 1


def test_tags_train_the_first_sub_word_or_all(chatml: Tokenizer, data: ConfigDict) -> None:
    reader = Reader("tags", TAGS)
    example = Example("f:1", words=("unknowable", "cat", "sat"), labels=("B-PER", "2", "B-LOC"))  # by name or number
    whole, first = readers.first_tokens(example, chatml)
    _, found = chatml.encode_words(example.words or ())
    assert first == [found.index(word) for word in range(3)]
    encoded = readers.encode(example, reader, chatml, data)
    assert np.flatnonzero(encoded.weights).tolist() == first
    assert encoded.targets[first].tolist() == [1, 2, 3]
    data.tag_subwords = "all"
    encoded = readers.encode(example, reader, chatml, data)
    assert encoded.weights.all()
    pieces = encoded.targets[np.asarray(found) == 0]
    assert pieces[0] == 1
    assert set(pieces[1:].tolist()) == {2}, "B-PER goes on as I-PER"
    assert set(encoded.targets[np.asarray(found) == 2].tolist()) == {3}, "there is no I-LOC to go on with"
    assert readers.answer(example, reader) == ["B-PER", "I-PER", "B-LOC"]


def test_a_cut_keeps_what_closes_a_text_and_nothing_else() -> None:
    tokens = np.arange(9, dtype=np.int32)
    for closing, kept in ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 8])):
        cut = readers.Encoded(tokens, tokens.astype(np.float32), tokens, closing).cut(4)
        assert cut.tokens.tolist() == cut.targets.tolist() == cut.weights.tolist() == kept


def test_rows_of_several_labels_and_of_tags_are_read(data: ConfigDict) -> None:
    data.prompt, data.label_column, data.chat = "{text}", "about", False
    rows = [(1, {"text": "x", "about": ["a", "b"]}), (2, {"text": "x", "about": []})]
    read = to_examples(rows, "f", data)[0]
    assert [(e.labels, e.answer) for e in read] == [(("a", "b"), "a, b"), ((), "")]
    data.label_separator = ";"
    rows = [(1, {"text": "x", "about": "a; b"}), (2, {"text": "x", "about": ""})]
    assert [e.labels for e in to_examples(rows, "f", data)[0]] == [("a", "b"), ()]
    data.prompt = data.label_column = ""
    for row in ({"tokens": ["a", "b"], "ner_tags": [0, 2]}, {"words": "a b", "tags": "0 2"}):
        (example,), _ = to_examples([(1, row)], "f", data)
        assert (example.words, example.labels) == (("a", "b"), ("0", "2"))


def test_what_a_row_lacks_is_said_with_its_place(chatml: Tokenizer, data: ConfigDict) -> None:
    def refuse(example: Example, reader: Reader, match: str) -> None:
        with pytest.raises(UserError, match=rf"^f:1: {match}"):
            readers.encode(example, reader, chatml, data)

    refuse(
        Example("f:1", prompt="a", labels=("goood",)),
        Reader("labels", ("good", "bad")),
        "answer 'goood' is no label; did you mean 'good'",
    )
    refuse(Example("f:1", prompt="a", answer="fine"), Reader("number"), "answer 'fine' is no number")
    refuse(Example("f:1", prompt="a", answer="nan"), Reader("number"), "answer 'nan' is no number")
    refuse(
        Example("f:1", words=("a", "b"), labels=("O", "B-PRE")),
        Reader("tags", TAGS),
        "word 2: tag 'B-PRE' is no tag; did you mean 'B-PER'",
    )
    refuse(Example("f:1", prompt="a", answer="O"), Reader("tags", TAGS), "has no words with tags")
    refuse(Example("f:1", text="a"), Reader("label", ("O",)), "has no prompt apart from its answer")
