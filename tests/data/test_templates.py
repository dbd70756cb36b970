"""Loss weights mean what they say: the trained text, read back from the tokens, is exactly the wanted one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from jaxtune.data import pipeline, templates
from jaxtune.data.formats import Example, to_examples
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import UserError


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TWO_TURNS = (user("the cat"), assistant("sat"), user("and"), assistant("a good film"))


def trained(example: Example, tokenizer: Tokenizer, data: ConfigDict) -> list[str]:
    """Returns the trained stretches of text."""
    tokens, weights, *_ = templates.encode(example, tokenizer, data)
    assert tokens.dtype == np.int32
    assert weights.dtype == np.float32
    assert tokens.shape == weights.shape
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
    return [tokenizer.decode(tokens[a:b], skip_special=False) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("end_of_turn", "expected"),
    [
        ("turn", ["sat<|im_end|>", "a good film<|im_end|>"]),
        ("last", ["sat", "a good film<|im_end|>"]),
        ("none", ["sat", "a good film"]),
        ("all", ["<|im_end|>", "sat<|im_end|>", "<|im_end|>", "a good film<|im_end|>"]),
    ],
)
def test_end_of_turn_options(end_of_turn: str, expected: list[str], chatml: Tokenizer, data: ConfigDict) -> None:
    data.end_of_turn = end_of_turn
    assert trained(Example("f:1", TWO_TURNS), chatml, data) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["sat<|im_end|>", "a good film<|im_end|>"]),
        ("stripping", [" sat </s>", " a good film </s>"]),
        ("headers", ["sat<|eot|>", "a good film<|eot|>"]),
        ("thinking", ["sat<|im_end|>", "<think>\n\n</think>\n\na good film<|im_end|>"]),
    ],
)
def test_every_template_trains_the_assistant_alone(
    tokenizers: Any, name: str, expected: list[str], data: ConfigDict
) -> None:
    example = Example("f:1", TWO_TURNS)
    assert trained(example, tokenizers[name], data) == expected
    assert templates.trains_stop(templates.encode(example, tokenizers[name], data), tokenizers[name])


@pytest.mark.parametrize("name", ["chatml", "stripping", "headers"])
def test_contents_that_repeat_headers_do_not_confuse(tokenizers: Any, name: str, data: ConfigDict) -> None:
    tokenizer = tokenizers[name]
    spaced = Example("f:1", (user("assistant"), assistant("  user\n"), user("user"), assistant("user")))
    last = {"chatml": "user<|im_end|>", "stripping": " user </s>", "headers": "user<|eot|>"}[name]
    first = "  user\n<|im_end|>" if name == "chatml" else last
    assert trained(spaced, tokenizer, data) == [first, last]


def test_thinking_is_trained_where_the_template_keeps_it(tokenizers: Any, data: ConfigDict) -> None:
    chat = (user("a"), assistant("<think>\nhm\n</think>\n\nsat"), user("b"), assistant("<think>\nso\n</think>\n\nmat"))
    expected = ["sat<|im_end|>", "<think>\nso\n</think>\n\nmat<|im_end|>"]
    assert trained(Example("f:1", chat), tokenizers["thinking"], data) == expected


def test_weight_zero_masks_the_turn_and_its_end(chatml: Tokenizer, data: ConfigDict) -> None:
    chat = (user("a"), assistant("sat", weight=0), user("b"), assistant("mat", weight=1))
    assert trained(Example("f:1", chat), chatml, data) == ["mat<|im_end|>"]
    data.end_of_turn = "last"
    chat = (user("a"), assistant("sat"), user("b"), assistant("mat", weight=0))
    assert trained(Example("f:1", chat), chatml, data) == ["sat<|im_end|>"]


def test_other_roles_can_be_trained(chatml: Tokenizer, data: ConfigDict) -> None:
    data.roles = ("user", "system")
    chat = ({"role": "system", "content": "system"}, *TWO_TURNS)
    assert trained(Example("f:1", chat), chatml, data) == ["system<|im_end|>", "the cat<|im_end|>", "and<|im_end|>"]


def test_tool_calls_are_trained_and_tools_are_shown(chatml: Tokenizer, data: ConfigDict) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": "<|im_end|>"}'}}
    raw = [user("1+1"), assistant("", tool_calls=[call]), {"role": "tool", "content": "2"}, assistant("It is 2")]
    tools = [{"type": "function", "function": {"name": "add"}}]
    (example,), _ = to_examples([(1, {"messages": raw, "tools": tools})], "f", data)
    assert trained(example, chatml, data) == [
        '<call>add {"a": "<|im_end|>"}</call><|im_end|>',
        "It is 2<|im_end|>",
    ]
    tokens, *_ = templates.encode(example, chatml, data)
    assert '"name": "add"' in chatml.decode(tokens).replace('":"', '": "')


def test_tools_that_the_template_hides_are_noticed(tokenizers: Any, chatml: Tokenizer, data: ConfigDict) -> None:
    call = {"function": {"name": "add", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    called = (user("1"), assistant("", tool_calls=[call], weight=0), assistant("2"))
    hidden = Example("f:1", TWO_TURNS, tools), Example("f:2", called)
    assert [templates.hides_tools(example, tokenizers["headers"]) for example in hidden] == [True, True]
    assert [templates.hides_tools(example, chatml) for example in hidden] == [False, False]
    assert not templates.hides_tools(Example("f:3", TWO_TURNS), tokenizers["headers"])
    assert pipeline.tokenize([hidden[1]], tokenizers["headers"], data).counts["tools_not_in_template"] == 1


def test_template_that_prints_no_tool_calls_is_refused(tokenizers: Any, data: ConfigDict) -> None:
    call = {"function": {"name": "add", "arguments": {}}}
    with pytest.raises(UserError, match=r"^f:1: message 2: the chat template does not print the tool calls \(add\)"):
        templates.encode(Example("f:1", (user("1"), assistant("", tool_calls=[call]))), tokenizers["headers"], data)


def test_content_the_template_hides_is_refused(tokenizer_of: Any, data: ConfigDict) -> None:
    shouting = tokenizer_of("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}")
    with pytest.raises(UserError, match=r"^f:1: message 2: the chat template changes its content 'sat'"):
        templates.encode(Example("f:1", TWO_TURNS), shouting, data)


def test_template_without_end_of_turn_is_reported(tokenizer_of: Any, data: ConfigDict) -> None:
    endless = tokenizer_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    encoded = templates.encode(Example("f:1", TWO_TURNS), endless, data)
    assert encoded.weights.any()
    assert not templates.trains_stop(encoded, endless)


def test_bos_is_never_doubled(tokenizers: Any, data: ConfigDict) -> None:
    headers, plain = tokenizers["headers"], tokenizers["plain_bos"]
    for example in (Example("f:1", TWO_TURNS), Example("f:1", text="the cat"), Example("f:1", text="<s>the cat")):
        tokens, *_ = templates.encode(example, headers, data)
        assert (tokens == headers.bos_id).sum() == 1
        assert tokens[0] == headers.bos_id
    tokens, weights, *_ = templates.encode(Example("f:1", text="the cat"), plain, data)
    assert plain.decode(tokens, skip_special=False) == "<s>the cat</s>"
    assert weights.tolist() == [0] + [1] * (len(tokens) - 1)


def test_plain_prompt_and_answer(tokenizers: Any, data: ConfigDict) -> None:
    example = Example("f:1", prompt="the film: ", answer="good")
    assert trained(example, tokenizers["plain"], data) == [" good</s>"]
    data.end_of_turn = "none"
    assert trained(example, tokenizers["plain"], data) == [" good"]


@pytest.mark.parametrize("labels", [["good", "bad", "goodness me"], ["日", "本"]])
@pytest.mark.parametrize("name", ["chatml", "stripping", "headers", "thinking", "plain", "plain_bos"])
def test_continuations_are_the_training_tokens(tokenizers: Any, name: str, labels: list[str], data: ConfigDict) -> None:
    tokenizer = tokenizers[name]
    if name.startswith("plain"):
        examples = {label: Example("f:1", prompt="a film: ", answer=label) for label in labels}
    else:
        examples = {label: Example("f:1", (user("a film"), assistant(label))) for label in labels}
    prompt, candidates = templates.continuations(examples[labels[1]], labels, tokenizer)
    for label, candidate in zip(labels, candidates, strict=True):
        tokens = templates.encode(examples[label], tokenizer, data).tokens.tolist()
        whole = prompt + candidate
        assert whole == tokens[: len(whole)]
        assert candidate[-1] in tokenizer.stop_ids
        assert tokenizer.decode(tokens[len(whole) :]).strip() == ""
        assert tokenizer.decode(candidate).rstrip().endswith(label)
    assert prompt == templates.prompt_ids(examples[labels[1]], tokenizer)


def test_a_label_that_reaches_back_takes_the_token_from_the_prompt(data: ConfigDict) -> None:
    vocab = {piece: index for index, piece in enumerate(["g", "o", "d", "x", "go", "od"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[("o", "d"), ("g", "o")]))
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    # "god" is g+od and "gox" is go+x: no token of the prompt "go" is common to both.
    assert templates.continuations(Example("f:1", prompt="go"), ["d", "x"], tokenizer) == ([], [[0, 5], [4, 3]])
    assert templates.continuations(Example("f:1", prompt="go"), ["x", "x"], tokenizer) == ([4], [[3], [3]])


def test_prompt_ids_open_the_assistant_s_turn(chatml: Tokenizer, tokenizers: Any) -> None:
    whole = templates.prompt_ids(Example("f:1", (user("Hi"), assistant("Hello"))), chatml)
    assert whole == templates.prompt_ids(Example("f:1", (user("Hi"),)), chatml)
    assert chatml.decode(whole, skip_special=False).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    plain = tokenizers["plain"]
    assert plain.decode(templates.prompt_ids(Example("f:1", prompt="a film: "), plain)) == "a film:"


def test_comparing_labels_needs_a_prompt(tokenizers: Any) -> None:
    with pytest.raises(UserError, match="f:1: comparing labels needs a row with a prompt"):
        templates.continuations(Example("f:1", text="a"), ["a"], tokenizers["plain"])


@pytest.mark.parametrize("name", ["chatml", "stripping", "headers"])
def test_spans_weigh_parts_of_an_answer(name: str, tokenizers: dict[str, Tokenizer], data: ConfigDict) -> None:
    """The words of a span have its weight, the rest that of the message; white space that a template strips shifts nothing."""
    content, tokenizer = "  a good film, a bad film ", tokenizers[name]

    def weights(**more: Any) -> dict[str, float]:
        row = {"messages": [user("the cat"), assistant(content, **more)]}
        (example,), _ = to_examples([(1, row)], "f", data)
        encoded = templates.encode(example, tokenizer, data)
        words = [tokenizer.decode_token(int(token)).strip("Ġ ▁'") for token in encoded.tokens]
        return dict(zip(words, encoded.weights.tolist(), strict=True))

    good, bad = content.index("good"), content.index("bad")
    found = weights(spans=[[good, good + 4, 0.25], [bad, bad + 3, 3]])
    assert (found["good"], found["bad"], found["film"], found["cat"]) == (0.25, 3.0, 1.0, 0.0)
    found = weights(spans=[[good, good + 4, 2]], weight=0)
    assert {word: weight for word, weight in found.items() if weight} == {"good": 2.0}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"spans": [[0, 9, 1]]}, "not inside the content, of 3 characters"),
        ({"spans": [[0, 2]]}, "expected \\[start, end, weight\\]"),
        ({"spans": [[0, 2, -1]]}, "expected 0 or more"),
        ({"spans": "all"}, "must be a list"),
    ],
)
def test_bad_spans_are_refused(more: dict[str, Any], says: str, data: ConfigDict) -> None:
    with pytest.raises(UserError, match=says):
        to_examples([(1, {"messages": [user("the cat"), assistant("sat", **more)]})], "f", data)
