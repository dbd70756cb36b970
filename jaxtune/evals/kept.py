"""What was measured, kept in the workdir for a run that resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtune import tracking
from jaxtune.config import ConfigDict
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, tasks
from jaxtune.train.state import Params, Program


def before(
    config: ConfigDict, workdir: Path, held: measure.HeldOut | None, tokenizer: Tokenizer, program: Program, params: Params,
    show: Any, say: Callable[[str], None],
) -> tasks.Result | None:  # fmt: skip
    """The untuned model's result: measured once, kept in the workdir for a run that resumes and asks the same."""
    if held is None or not config.eval.before_after:
        return None
    file, asked = workdir / "before.json", measure.asked(config, held)
    if config.checkpoint.resume and jax.process_count() == 1 and file.exists():  # hosts may not see the same files
        kept = tasks.from_json(file.read_text(), asked)
        if kept is not None:
            return kept
        say("what is measured has changed since the run began: the untuned model is measured again")
    result = measure.measure(config, held, tokenizer, program, params, show, "before")
    if jax.process_index() == 0:
        write(file, tasks.to_json(result, asked))
    return result


def write(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    try:
        with tracking.writing(path):
            partial_path.write_text(text, encoding="utf-8")
            partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)
