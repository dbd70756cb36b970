"""Every known shape of row becomes the same chat, and every bad row one line with its file and number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from jaxtune.data.formats import Example, to_examples
from jaxtune.types import UserError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def one(row: dict[str, Any], data: ConfigDict, **kwargs: Any) -> Example:
    examples, _ = to_examples([(7, row)], "f.jsonl", data, **kwargs)
    return examples[0]


SAME_CHAT = {
    "messages": {"messages": [USER, ASSISTANT], "parallel_tool_calls": True},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "chatgpt": {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "trl": {"prompt": [USER], "completion": [ASSISTANT]},
}


@pytest.mark.parametrize("shape", SAME_CHAT)
def test_shapes_are_detected_and_agree(shape: str, data: ConfigDict) -> None:
    example = one(SAME_CHAT[shape], data)
    assert example.messages == (USER, ASSISTANT)
    assert (example.row_id, example.answer) == ("f.jsonl:7", "Hello")


def test_plain_forms(data: ConfigDict) -> None:
    data.chat = False
    assert one({"text": "all of it"}, data).text == "all of it"
    plain = one({"prompt": "2+2=", "completion": "4"}, data)
    assert (plain.messages, plain.prompt, plain.answer) == (None, "2+2=", "4")
    alpaca = one({"instruction": "Add", "input": "2 2", "output": "4"}, data)
    assert alpaca.prompt == "### Instruction:\nAdd\n\n### Input:\n2 2\n\n### Response:\n"


def test_openai_extras(data: ConfigDict) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        {"role": "developer", "content": "Be kind"},
        {**ASSISTANT, "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {**ASSISTANT, "weight": 1},
    ]
    example = one({"messages": rows, "tools": [{"type": "function"}]}, data)
    assert example.messages is not None
    assert [m["role"] for m in example.messages] == ["system", "assistant", "assistant", "tool", "assistant"]
    assert example.messages[1]["weight"] == 0
    assert example.messages[2]["content"] == ""
    assert example.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.tools == [{"type": "function"}]


def test_trl_prompts_are_not_learned_from(data: ConfigDict) -> None:
    example = one({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}, data)
    assert example.messages is not None
    assert [m.get("weight", 1) for m in example.messages if m["role"] == "assistant"] == [0, 1]


def test_labelled_template_bins_and_counts(data: ConfigDict) -> None:
    data.prompt, data.system, data.label_column = "Review: {text} {{x}}\nSentiment:", "Judge {kind}.", "score"
    data.label_bins = ((-4.0, -0.5, "negative"), (0.5, 4.1, "positive"))
    rows = [{"text": "good", "kind": "films", "score": score} for score in ("3.2", "-1", "0.0", "0.5", "-0.5")]
    examples, dropped = to_examples(enumerate(rows, 1), "f.csv", data)
    assert [e.answer for e in examples] == ["positive", "negative", "positive"]  # low <= x < high
    assert dropped == {"label_outside_bins": 2}
    assert examples[0].messages == (
        {"role": "system", "content": "Judge films."},
        {"role": "user", "content": "Review: good {x}\nSentiment:"},
        {"role": "assistant", "content": "positive"},
    )
    data.chat = False
    plain, _ = to_examples(enumerate(rows, 1), "f.csv", data)
    assert plain[0].prompt == "Judge films.\n\nReview: good {x}\nSentiment: "


def test_rows_without_answers_serve_generation(data: ConfigDict) -> None:
    example = one({"messages": [USER]}, data, answers=False)
    assert (example.messages, example.answer) == ((USER,), None)
    data.format = "prompt_completion"
    assert one({"prompt": "Hi"}, data, answers=False).messages == (USER,)


def test_split_key_is_the_row_or_its_column(data: ConfigDict) -> None:
    assert one({"text": "a", "x": 1}, data).split_key == one({"x": 1, "text": "a"}, data).split_key
    data.split_key = "x"
    assert one({"text": "a", "x": 1}, data).split_key == "1"


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def called(function: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]})


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown shape": ({"message": []}, {}, r"fields 'message' fit no known format; did you mean 'messages'.*alpaca: "),
    "missing field": ({"prompt": "a"}, {"format": "prompt_completion"}, r"no field 'completion'; the row has 'prompt'"),
    "near field": ({"txt": "a"}, {"format": "text"}, r"no field 'text'; did you mean 'txt'\?; the row has 'txt'"),
    "not text": ({"text": 3}, {}, r"field 'text' is 3; expected a string"),
    "not a list": ({"messages": "Hi"}, {}, r"field 'messages' is 'Hi'; expected a list"),
    "no messages": (chat(), {}, r"the list of messages is empty"),
    "not a message": (chat("Hi"), {}, r"message 1 is 'Hi'; expected an object"),
    "role": (
        chat(USER, {"role": "asistant", "content": "a"}), {},
        r"message 2: unknown role 'asistant'; did you mean 'assistant'.*; allowed: system, user",
    ),
    "no assistant": (chat(USER), {}, r"no assistant message"),
    "weight": (chat(USER, {**ASSISTANT, "weight": 0.5}), {}, r"message 2: weight is 0\.5; expected 0 or 1"),
    "weight true": (chat(USER, {**ASSISTANT, "weight": True}), {}, r"message 2: weight is True"),
    "weight of user": (chat({**USER, "weight": 1}, ASSISTANT), {}, r"message 1: weight on a user message"),
    "null": (chat(USER, {"role": "assistant", "content": None}), {}, r"message 2: content is None"),
    "no content": (
        chat(USER, {"role": "assistant", "contents": "a"}), {},
        r"no field 'content'; did you mean 'contents'",
    ),
    "image": (
        chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), {},
        r"content part 'image_url'; only text",
    ),
    "arguments": (called({"name": "f", "arguments": "{"}), {}, r"message 2: arguments of tool 'f' are not JSON"),
    "call": (called({}), {}, r"message 2: tool call .* expected"),
    "calls of user": (chat({**USER, "tool_calls": [1]}, ASSISTANT), {}, r"tool_calls must be a list, on an assistant"),
    "tools": ({**chat(USER, ASSISTANT), "tools": "add"}, {}, r"tools are not JSON"),
    "tools kind": (
        {**chat(USER, ASSISTANT), "tools": ["add"]}, {},
        r"tools are \['add'\]; expected a list of functions",
    ),
    "sharegpt role": (
        {"conversations": [{"from": "humn", "value": "a"}]}, {},
        r"turn 1: unknown role 'humn'; did you mean 'human'",
    ),
    "sharegpt turn": ({"conversations": [{"from": "human"}]}, {}, r"turn 1 has 'from'; expected 'from' and 'value'"),
    "template column": (
        {"text": "a", "y": 1}, {"prompt": "{txet}", "label_column": "y"},
        r"data\.prompt names column 'txet'; did you mean 'text'.*; the row has 'text', 'y'",
    ),
    "template": ({"text": "a", "y": 1}, {"prompt": "{text", "label_column": "y"}, r"data\.prompt is not a template"),
    "label column": ({"text": "a", "y": 1}, {"prompt": "{text}", "label_column": "z"}, r"no field 'z'; the row has"),
    "empty label": ({"text": "a", "y": ""}, {"prompt": "{text}", "label_column": "y"}, r"label column 'y' is empty"),
    "not a number": (
        {"text": "a", "y": "n/a"}, {"prompt": "{text}", "label_column": "y", "label_bins": ((0, 1, "b"),)},
        r"label column 'y' is 'n/a'; expected a number",
    ),
    "no prompt": ({"text": "a"}, {"format": "labelled"}, r"needs data\.prompt"),
    "split key": ({"text": "a"}, {"split_key": "txet"}, r"data\.split_key names column 'txet'; did you mean 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str, data: ConfigDict) -> None:
    row, options, message = BAD[case]
    data.update(options)
    with pytest.raises(UserError, match=r"^f\.jsonl:7: .*" + message) as error:
        one(json.loads(json.dumps(row)), data)
    assert "\n" not in str(error.value)


def test_empty_file(data: ConfigDict) -> None:
    with pytest.raises(UserError, match=r"f\.jsonl: holds no rows"):
        to_examples([], "f.jsonl", data)


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"instruction": "Hi", "input": ""}, {"text": "Hi"}])
def test_a_prompt_alone_is_detected_where_no_answer_is_needed(row: dict[str, str], data: ConfigDict) -> None:
    data.format = "auto"
    (example,), _ = to_examples([(1, row)], "f", data, answers=False)
    assert (example.prompt or example.messages[0]["content"]) == "Hi"
    assert example.answer is None
