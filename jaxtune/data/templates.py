"""Examples to tokens and loss weights: rendered once by the model's own template, weighted by character offsets.

Stock chat templates do not say which text is the assistant's. So each message is rendered once more with a mark in
place of its content, inside the whole conversation: what stands before and after the mark gives the exact span of the
content, also where a template strips it, adds a default system prompt or treats the last turn differently.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data.formats import Example
from jaxtune.data.messages import Message
from jaxtune.data.tokenizer import MARK, Tokenizer
from jaxtune.types import UserError


class Encoded(NamedTuple):
    """Token ids, and of each token the loss weight of predicting it (shifting to the left happens in packing).

    With `targets` (int32) each token is to be classed, and its weight is that of its own class; `scores_C` (float32) stand
    in place of a text's class where it has several labels or a number. `closing` last tokens stay when the text is cut.
    """

    tokens: np.ndarray  # int32
    weights: np.ndarray  # float32
    targets: np.ndarray | None = None
    closing: int = 0
    scores_C: np.ndarray | None = None

    def cut(self, length: int) -> Encoded:
        """`length` tokens: the first ones, and those that close the text or are read."""
        if length >= len(self.tokens):
            return self
        kept = np.r_[0 : length - self.closing, len(self.tokens) - self.closing : len(self.tokens)]
        targets = None if self.targets is None else self.targets[kept]
        return self._replace(tokens=self.tokens[kept], weights=self.weights[kept], targets=targets)


Span = tuple[int, int] | tuple[int, int, float]  # characters from one to another; the weight of their tokens, else 1


class Turn(NamedTuple):
    """Where one message lies in the rendered chat, in characters: its content, then its end-of-turn text."""

    start: int
    end: int
    stop: int  # end of the end-of-turn text, which starts at `end`; equal to `end` when there is none


def encode(example: Example, tokenizer: Tokenizer, options: ConfigDict) -> Encoded:
    """Returns the tokens of one example and their loss weights, by `options.roles` and `options.end_of_turn`.

    A chat holds BOS only where its template writes it; plain text gets the tokenizer's BOS, never twice, and EOS. Virtual
    tokens stand before all.

    Raises:
      UserError: the template refuses the chat, or changes a trained content so that it cannot be found.
    """
    try:
        if example.is_pair:
            raise UserError("the row is a query and a passage: these go with train.objective='contrastive'")
        if example.branches:
            raise UserError(
                "the row compares two answers: that goes with train.objective='dpo', or another of preferences"
            )
        if example.messages is not None:
            text, weighed = _chat_spans(example, tokenizer, options)
            ids, offsets = tokenizer.encode_with_offsets(text)
            return _after_virtual(ids, _weigh(offsets, weighed), tokenizer)
        text, spans = _plain_spans(example)
        ids, offsets = _with_bos(*tokenizer.encode_with_offsets(text), tokenizer)
        weights = _weigh(offsets, spans)
        if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids = [*ids, tokenizer.eos_id]
            weights = np.append(weights, np.float32(options.end_of_turn != "none"))
        return _after_virtual(ids, weights, tokenizer)
    except UserError as error:
        raise UserError(f"{example.row_id}: {error}") from None


def _after_virtual(ids: list[int], weights: np.ndarray, tokenizer: Tokenizer) -> Encoded:
    tokens = np.array([*tokenizer.virtual_ids, *ids], np.int32)
    return Encoded(tokens, np.r_[np.zeros(len(tokenizer.virtual_ids), np.float32), weights])


def hides_tools(example: Example, tokenizer: Tokenizer) -> bool:
    """Returns whether the chat template does not print the example's tools, or a tool call that is only to be read.

    A trained turn's calls are an error where they are missing: `encode` looks for their span.
    """
    messages = example.messages or ()
    calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    if not example.tools and not calls:
        return False
    try:
        text = tokenizer.render(messages, example.tools)
        return any(name not in text for name in calls) or bool(example.tools and text == tokenizer.render(messages))
    except UserError:
        return False  # a template that refuses the chat without its tools does look at them


def trains_stop(encoded: Encoded, tokenizer: Tokenizer) -> bool:
    """Returns whether a token that ends an answer is trained; a model that never sees one does not stop by itself."""
    return bool(np.isin(encoded.tokens[encoded.weights > 0], tokenizer.stop_ids).any())


def prompt_ids(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens to generate from: all before the answer, with the template's generation prompt."""
    if example.messages is not None:
        return [*tokenizer.virtual_ids, *tokenizer.encode(_prompt_text(example, tokenizer))]
    # A space at the end belongs to the answer's first token in most vocabularies, so the model is to write it.
    ids, offsets = tokenizer.encode_with_offsets((example.text or example.prompt).rstrip(" "))
    return [*tokenizer.virtual_ids, *_with_bos(ids, offsets, tokenizer)[0]]


def continuations(
    example: Example, labels: list[str] | tuple[str, ...], tokenizer: Tokenizer
) -> tuple[list[int], list[list[int]]]:
    """Returns the prompt's tokens and those of each label as its answer, end-of-turn token included.

    Prompt plus candidate is what `encode` gives for that answer, less what follows the end-of-turn token. Where a
    label's first token reaches back into the prompt, that token belongs to every candidate.

    Raises:
      UserError: the example is plain text without a prompt, or there is no label.
    """
    if example.text is not None or not labels:
        raise UserError(f"{example.row_id}: comparing labels needs a row with a prompt, and at least one label")
    encoded = [_answered(example, label, tokenizer) for label in labels]
    shared = min(shared for _, shared in encoded)
    shared = min(shared, len(os.path.commonprefix([ids for ids, _ in encoded])))
    return encoded[0][0][:shared], [ids[shared:] for ids, _ in encoded]


def _answered(example: Example, label: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Returns the tokens of the example with `label` as its answer, and how many end inside the prompt."""
    if example.messages is None:
        ids, offsets = _with_bos(*tokenizer.encode_with_offsets(example.prompt + label), tokenizer)
        boundary = len(example.prompt.rstrip(" "))
        ids = ids if tokenizer.eos_id is None else [*ids, tokenizer.eos_id]
    else:
        messages = [*before_answer(example), {"role": "assistant", "content": label}]
        text = tokenizer.render(messages, example.tools)
        turn = _turn(text, messages, len(messages) - 1, example, tokenizer)
        ids, offsets = tokenizer.encode_with_offsets(text[: turn.stop])
        prompt = _prompt_text(example, tokenizer)
        boundary = len(prompt) if text.startswith(prompt) else turn.start
    virtual = tokenizer.virtual_ids
    return [*virtual, *ids], len(virtual) + sum(end <= boundary for _, end in offsets)


def before_answer(example: Example) -> list[Message]:
    """A chat's turns before its answer."""
    messages = list(example.messages or ())
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _prompt_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.render(before_answer(example), example.tools, add_generation_prompt=True)


def _with_bos(
    ids: list[int], offsets: list[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[list[int], list[tuple[int, int]]]:
    if tokenizer.bos_id is None or not tokenizer.adds_bos or ids[:1] == [tokenizer.bos_id]:
        return ids, offsets
    return [tokenizer.bos_id, *ids], [(0, 0), *offsets]


def _plain_spans(example: Example) -> tuple[str, list[tuple[int, int]]]:
    if example.text is not None:
        return example.text, [(0, len(example.text))]
    text = example.prompt + (example.answer or "")
    return text, [(len(example.prompt), len(text))]


def _weigh(offsets: list[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """Returns for each token the weight of the last trained span that it shares a character with, else 0."""
    weights = np.zeros(len(offsets), np.float32)
    if offsets and spans:
        starts, ends = np.array(offsets).T
        for start, end, *given in spans:
            weights[(starts < end) & (ends > start)] = given[0] if given else 1
    return weights


def _chat_spans(example: Example, tokenizer: Tokenizer, options: ConfigDict) -> tuple[str, list[Span]]:
    """Returns the rendered chat and its trained character spans; those that a message weighs itself after its content."""
    messages = example.messages or ()
    text = tokenizer.render(messages, example.tools)
    trained = [m["role"] in options.roles and m.get("weight", 1) != 0 for m in messages]
    last = max((index for index, train in enumerate(trained) if train), default=-1)
    spans: list[Span] = []
    for index, train in enumerate(trained):
        own = messages[index].get("spans", ()) if messages[index]["role"] in options.roles else ()
        if not train and not own and options.end_of_turn != "all":
            continue
        try:
            turn = _turn(text, list(messages), index, example, tokenizer)
        except UserError:
            if train or own:
                raise
            continue  # an untrained turn whose content the template hides has no end-of-turn token to train
        ends = {"all": True, "turn": train, "last": index == last, "none": False}[options.end_of_turn]
        spans += [(turn.start, turn.end)] if train else []
        spans += _own_spans(text, turn, messages[index]["content"], own, index)
        spans += [(turn.end, turn.stop)] if ends else []
    return text, spans


def _own_spans(
    text: str, turn: Turn, content: str, spans: Sequence[tuple[int, int, float]], index: int
) -> list[tuple[int, int, float]]:
    """A message's own spans, counted from the start of its content, as they lie in the rendered chat."""
    if not spans:
        return []
    stripped = content.strip()  # as most templates print it
    at = text.find(stripped, turn.start, turn.end)
    if at < 0 or not stripped:
        raise UserError(
            f"message {index + 1}: the chat template changes its content {content!r:.60}: its spans cannot be found; "
            "mend the template (model.chat_template), or leave them out"
        )
    at -= len(content) - len(content.lstrip())
    return [(max(at + start, turn.start), min(at + end, turn.end), weight) for start, end, weight in spans]


def _turn(text: str, messages: list[Message], index: int, example: Example, tokenizer: Tokenizer) -> Turn:
    """Returns where message `index` lies in `text`, the rendering of `messages`."""
    message = messages[index]
    opening = _opening(text, messages, index, example, tokenizer) if message["role"] == "assistant" else None
    if message.get("tool_calls"):
        start, end = _to_next(text, messages, index, opening, example, tokenizer)
    else:
        start, end = _content(text, messages, index, opening, example, tokenizer)
        start = opening if opening is not None and opening <= end else start
    stop_text = tokenizer.end_of_turn
    # Templates put at most white space between a content and its end-of-turn text.
    gap = len(text[end:]) - len(text[end:].lstrip())
    if stop_text and text.startswith(stop_text, end + gap):
        return Turn(start, end + gap, end + gap + len(stop_text))
    return Turn(start, end, end)


def _opening(text: str, messages: list[Message], index: int, example: Example, tokenizer: Tokenizer) -> int | None:
    """Returns where the generation prompt before an assistant message ends: the model writes all from there on."""
    try:
        head = tokenizer.render(messages[:index], example.tools, add_generation_prompt=True) if index else ""
    except UserError:
        return None  # templates may refuse a chat that stops half-way
    return len(head) if head and text.startswith(head) else None


def _content(
    text: str, messages: list[Message], index: int, opening: int | None, example: Example, tokenizer: Tokenizer
) -> tuple[int, int]:
    marked = list(messages)
    marked[index] = {**messages[index], "content": MARK}
    before, found, after = tokenizer.render(marked, example.tools).partition(MARK)
    start, end = len(before), len(text) - len(after)
    content = messages[index]["content"].strip()
    if found and start <= end and text.startswith(before) and text.endswith(after) and content in text[start:end]:
        return start, end
    # The template rewrites this content (some move or drop the thinking): accept it where its answer stands.
    answer = content.rpartition("</think>")[2].strip()
    if opening is not None and answer:
        at = text.find(answer, opening)
        next_turn = text.find(tokenizer.end_of_turn, opening) if tokenizer.end_of_turn else len(text)
        if 0 <= at <= next_turn:
            return opening, at + len(answer)
    raise UserError(
        f"message {index + 1}: the chat template changes its content {content!r:.60}: its tokens cannot be told apart; "
        "mend the template (model.chat_template)"
    )


def _to_next(
    text: str, messages: list[Message], index: int, opening: int | None, example: Example, tokenizer: Tokenizer
) -> tuple[int, int]:
    """Returns the span from an opening to the end-of-turn text: tool calls, as the template prints them."""
    if opening is None:
        raise UserError(
            f"message {index + 1}: the chat template's generation prompt does not open the turn with tool calls; "
            "mend the template (model.chat_template)"
        )
    try:
        head = tokenizer.render(messages[: index + 1], example.tools)
    except UserError:
        head = ""
    known = bool(head) and text.startswith(head)
    limit = len(head) if known else len(text)
    calls = [call["function"]["name"] for call in messages[index]["tool_calls"]]
    if any(name not in text[opening:limit] for name in calls):
        raise UserError(
            f"message {index + 1}: the chat template does not print the tool calls ({', '.join(calls)}); "
            "set model.chat_template to one that does"
        )
    stop_text = tokenizer.end_of_turn
    # The last one before a known end, since an argument may quote it; otherwise the first one after the opening.
    stop = -1 if not stop_text else (text.rfind if known else text.find)(stop_text, opening, limit)
    return opening, stop if stop >= 0 else len(text[:limit].rstrip())
