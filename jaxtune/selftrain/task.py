"""The task of a self-training run: prompts, held-out rows and gold answers; as examples, and as files that `train` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, privacy, templates
from jaxtune.data.formats import Example, fill
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.rewards import scoring
from jaxtune.selftrain import gold
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError


class Task(NamedTuple):
    """`prompts` are asked; `too_long` are those that leave no room for an answer; `held` is the test split."""

    prompts: list[Example]
    too_long: list[Example]
    held: list[Example]
    digest: str  # of all of them

    @property
    def gold(self) -> list[Example]:
        """The prompts whose rows have an answer."""
        return [example for example in self.prompts if example.answer is not None]


def read(config: ConfigDict, tokenizer: Tokenizer, max_positions: int, show: Any) -> Task:
    """Reads `data.train` (prompts, with answers or without) and holds rows out, by the config's own split.

    Raises:
      UserError: bad data; nothing to measure on; rows that a verifier cannot judge; no prompt that leaves room.
    """
    data = config.data.copy_and_resolve_references()
    if not data.eval:
        data.validation_fraction = 0.0  # of what a round keeps there is no validation loss that would mean anything
    private = privacy.of(config.privacy)
    splits = pipeline.load(
        data, rows_lib.paths(config), tokenizer, show, keep_rows=True, answers=False, private=private
    )
    if not splits.test:
        raise UserError("self_train measures every round on held-out rows: set data.test_fraction or data.test")
    asked = splits.train
    plain = next((e for e in (*asked, *splits.test) if e.messages is None and not e.prompt), None)
    if plain is not None or any(e.is_pair for e in asked):
        raise UserError(
            f"{(plain or asked[0]).row_id}: self_train needs prompts: chats, or rows with a prompt of their own"
        )
    if config.reward.functions:
        everybody = [*asked, *splits.test]
        rows = [scoring.row_of(example) for example in everybody]
        scoring.check_rows(config.reward, [example.row_id for example in everybody], rows)
    room = min(max_positions, config.data.max_length) - config.self_training.max_new_tokens
    gold.check_rows(config, asked)
    fits = [len(templates.prompt_ids(gold.asked(config, example), tokenizer)) <= room for example in asked]
    if not any(fits):
        raise UserError(
            f"none of the {len(asked)} prompts leaves room for an answer: data.max_length={config.data.max_length} (of the model's "
            f"{max_positions} positions), self_training.max_new_tokens={config.self_training.max_new_tokens}; change one of them"
        )
    _check_held(config, splits.test, tokenizer, max_positions)
    prompts = [example for example, fit in zip(asked, fits, strict=True) if fit]
    too_long = [example for example, fit in zip(asked, fits, strict=True) if not fit]
    text = json.dumps([[e.row_id, line(e, e.answer)] for e in (*asked, *splits.test)], sort_keys=True, default=str)
    return Task(prompts, too_long, splits.test, hashlib.sha256(text.encode()).hexdigest())


def _check_held(config: ConfigDict, held: list[Example], tokenizer: Tokenizer, max_positions: int) -> None:
    """Refuses, before a round is sampled, a held-out prompt that leaves no room for the answer that it is measured by."""
    if config.eval.metric not in ("exact_match", "reward") and not (
        config.eval.metric == "auto" and config.reward.functions
    ):
        return
    for example in pipeline.limited(held, config.eval.limit):
        length, room = len(templates.prompt_ids(example, tokenizer)), config.generate.max_new_tokens
        if length + room > max_positions:
            raise UserError(
                f"{example.row_id}: a held-out prompt of {length} tokens and generate.max_new_tokens={room} exceed the model's "
                f"{max_positions} positions: lower the latter, or leave the row out"
            )


def hinted(example: Example, template: str) -> Example:
    """The example with its answer told: the template, filled from the row, after a chat's last turn or before a plain prompt."""
    hint = fill(template, scoring.row_of(example), "self_training.hint")
    if example.messages is None:
        return example._replace(prompt=f"{hint.strip()}\n{example.prompt}")
    asked = templates.before_answer(example)
    return example._replace(messages=(*asked[:-1], {**asked[-1], "content": asked[-1]["content"] + hint}), answer=None)


def line(example: Example, answer: str | None) -> dict[str, Any]:
    """A row as `train` reads it (`options`): the prompt with this answer, of which alone is learned, beside the row's own columns."""
    if example.messages is None:
        # templates.prompt_ids leaves the space before an answer for the model to write.
        made: dict[str, Any] = {"prompt": example.prompt.rstrip(" ")}
        return {**(example.row or {}), **made, **({} if answer is None else {"completion": answer})}
    turns = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in templates.before_answer(example)]
    made = {"messages": turns + ([] if answer is None else [{"role": "assistant", "content": answer}])}
    return {**(example.row or {}), **made, **({"tools": example.tools} if example.tools else {})}


def options(data: ConfigDict, is_chat: bool, train: Path, test: Path) -> None:
    """Sets the config's section to read files of such lines."""
    for key in (
        "prepare",
        "prompt",
        "passage",
        "negative",
        "label_column",
        "split_key",
        "split_regex",
        "eval",
        "files",
    ):
        data[key] = ""
    data.columns, data.label_bins, data.limit = (), (), 0
    data.validation_fraction, data.test_fraction = 0.0, 0.0
    data.chat, data.format = is_chat, "messages" if is_chat else "prompt_completion"
    data.train, data.test = str(train), str(test)
