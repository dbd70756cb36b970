"""Tasks: contexts of demonstrations as a pure function of seed and number, what of them trains, and which tasks are kept apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxtune import config as config_lib
from jaxtune.data import formats, pipeline, tasks, templates
from jaxtune.data.formats import Example
from jaxtune.types import UserError


def rows_of(number: int, task: str = "colour", **more: Any) -> list[Example]:
    """Rows of two answers that take no turns: all of one, then all of the other."""
    return [
        Example(f"{task}:{i}", prompt=f"{task} {i} ", answer="red" if i < number // 2 else "blue", task=task, **more)
        for i in range(number)
    ]


def meta(**changes: Any) -> Any:
    config = config_lib.base()
    config.meta.update(changes)
    return config.meta


def test_contexts_are_the_seeds_and_the_numbers() -> None:
    rows = rows_of(6, "colour") + rows_of(40, "shape")
    made = tasks.contexts(rows, 3, 50, seed=7)
    assert tasks.contexts(rows, 3, 80, seed=7)[:50] == made
    assert tasks.contexts(rows, 3, 50, seed=8) != made
    assert 15 <= sum(one.task == "colour" for one in made) <= 35  # tasks, not rows, are equally likely
    for one in made:
        shown = one.prompt.split("\n\n")
        assert len(shown) == 4
        assert len(set(shown)) == 4
        assert all(text.startswith(one.task) for text in shown)
        assert shown[-1].rstrip() == one.row_id.replace(":", " ")  # its own question comes last, unanswered


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="'colour' has 3 rows; expected more than meta.demonstrations=3"):
        tasks.contexts(rows_of(3) + rows_of(9, "shape"), 3, 5, 0)
    text = Example("a:1", text="once upon a time")
    with pytest.raises(UserError, match="a:1: a demonstration is a prompt with its answer"):
        tasks.demonstrated([text], rows_of(2)[0])


def test_a_single_row_held_out_is_asked_after_training_rows() -> None:
    rows = rows_of(8, "colour") + rows_of(8, "shape")
    splits = pipeline.Splits([*rows[:7], *rows[8:15]], [rows[7], rows[15]], [], {})
    found, trained = tasks.arrange(splits, meta(demonstrations=3), 0), {one.prompt.strip() for one in splits.train}
    assert len(found.validation) == 2
    for one in found.validation:
        *shown, question = [text.rstrip() for text in one.prompt.split("\n\n")]
        assert question in ("colour 7", "shape 7")
        assert len(set(shown)) == 3
        assert {text.rpartition(" ")[0] for text in shown} <= trained
        assert all(text.startswith(one.task) for text in shown)
    with pytest.raises(UserError, match="'colour' has 2 rows; expected more than meta.demonstrations=3"):
        tasks.contexts(rows[:1], 3, 1, 0, rows[1:3])


def test_only_the_last_answer_trains(chatml: Any) -> None:
    data, tokenizer = config_lib.base().data, chatml

    def chat(i: int, answer: str) -> Example:
        turns = [("system", "name it"), ("user", f"what is it {i}?"), ("assistant", answer)]
        messages = tuple({"role": role, "content": content} for role, content in turns)
        return Example(f"f:{i}", messages, answer=answer)

    one = tasks.demonstrated([chat(1, "red cat"), chat(2, "blue dog")], chat(3, "good bird"))
    assert one.messages is not None
    assert [m["role"] for m in one.messages] == ["system"] + ["user", "assistant"] * 3
    encoded = templates.encode(one, tokenizer, data)
    assert tokenizer.decode(encoded.tokens[encoded.weights != 0], skip_special=True) == "good bird"
    prompt, candidates = templates.continuations(one, ("good bird", "cat"), tokenizer)
    assert tokenizer.decode(prompt).count("what is it") == 3
    assert tokenizer.decode(prompt).endswith("blue dog\nuser\nwhat is it 3?\nassistant\n")
    assert tokenizer.decode(candidates[1]) == "cat"
    plain = templates.encode(tasks.demonstrated(rows_of(2)[:1], rows_of(2)[1]), tokenizer, data)
    assert tokenizer.decode(plain.tokens[plain.weights != 0]) == "blue"
    assert tokenizer.decode(plain.tokens) == "colour 0 red\n\ncolour 1 blue"


def test_drawn_rows_are_nested_and_take_turns() -> None:
    rows = rows_of(20)
    eight = tasks.drawn(rows, 8, seed=1, draw=2)
    assert tasks.drawn(rows, 4, seed=1, draw=2) == eight[:4]
    assert tasks.drawn(rows, 8, seed=1, draw=3) != eight
    for k in (2, 4, 8):
        assert sum(one.answer == "red" for one in eight[:k]) == k // 2
    assert tasks.drawn(rows, 0, 1, 2) == []


def test_held_out_tasks_are_never_trained_on() -> None:
    rows = rows_of(10, "colour") + rows_of(10, "shape") + rows_of(10, "size")
    splits = pipeline.Splits(rows[0::2], rows[1::4], rows[3::4], {})
    found = tasks.arrange(splits, meta(held_out=("shape",)), 0)
    assert {one.task for one in (*found.train, *found.validation)} == {"colour", "size"}
    assert {one.task for one in (*found.test, *found.support)} == {"shape"}
    assert not {one.row_id for one in found.test} & {one.row_id for one in found.support}
    shown = tasks.arrange(splits, meta(held_out=("shape",), demonstrations=2, contexts=30), 0)
    assert len(shown.train) == 30
    assert not any("shape" in one.prompt for one in (*shown.train, *shown.validation))
    assert tasks.arrange(splits, meta(), 0) is splits


def test_a_task_is_a_column_or_a_file() -> None:
    data, rows = config_lib.base().data, [(1, {"prompt": "a", "completion": "b", "kind": 3})]
    assert formats.to_examples(rows, "mail.jsonl", data, task_column="kind")[0][0].task == "3"
    assert formats.to_examples(rows, "mail.jsonl", data, task_column="")[0][0].task == "mail.jsonl"
    assert formats.to_examples(rows, "mail.jsonl", data)[0][0].task == ""
    with pytest.raises(UserError, match="mail.jsonl:1: meta.task_column names column 'kin'; did you mean 'kind'"):
        formats.to_examples(rows, "mail.jsonl", data, task_column="kin")


def test_bins_hold_one_task_each() -> None:
    lengths = np.asarray([3, 4, 5, 3, 4, 5, 3, 4])
    offsets = np.r_[0, np.cumsum(lengths)]
    rows = pipeline.Rows(
        np.ones(offsets[-1], np.int32), np.ones(offsets[-1], np.float32), offsets, [str(i) for i in range(8)]
    )
    named = ["a", "b"] * 4
    source = tasks.TaskSource(rows, named, 12, True, 0, 4, 0, num_tasks=2, num_batches=2)
    assert sorted(row for one in source.bins for row in one) == list(range(8))
    assert all(len({named[row] for row in one}) == 1 for one in source.bins)
    assert max(map(len, source.bins)) > 1
