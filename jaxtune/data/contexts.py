"""A prompt asked with its own answer told: to be restated, or as a demonstration that a teacher sees and its student does not."""

from __future__ import annotations

from jaxtune.data.formats import Example, fill
from jaxtune.data.templates import before_answer
from jaxtune.types import UserError


def told(example: Example, template: str, option: str) -> Example:
    """The example with its last turn, or its plain prompt, in the words of `template`.

    Args:
      template: over the row's columns, `{question}` (what it is put in the place of) and `{answer}` (the row's gold one, whole).
      option: the config's field that holds it.

    Raises:
      UserError: the row has no answer; the template names a column that it lacks.
    """
    if example.answer is None:
        raise UserError(f"{example.row_id}: {option} tells the row's answer, and this row has none: give every row one")
    turns = before_answer(example) if example.messages is not None else []
    question = turns[-1]["content"] if turns else example.prompt.rstrip()
    asked = fill(template, {**(example.row or {}), "question": question, "answer": example.answer}, option)
    if not turns:
        return example._replace(prompt=asked)
    return example._replace(messages=(*turns[:-1], {**turns[-1], "content": asked}))
