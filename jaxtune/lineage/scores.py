"""What each model of a lineage scores on each set, kept row by row: measured once, and read wherever it is asked for again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, protected, tasks
from jaxtune.evals.protected import Protected
from jaxtune.lineage.stages import Stage
from jaxtune.train import start
from jaxtune.weights import source
from jaxtune.weights.source import Model
from jaxtune.workdir import write_whole

Results = dict[str, tasks.Result]  # by the set's name


def of_stage(stage: Stage, margin: float, model: Model, tokenizer: Tokenizer) -> Protected:
    """A stage's held-out rows as a set that later releases are held to."""
    reader = start.reader(stage.config, model, tokenizer)
    held = measure.held_out(stage.config, stage.splits, tokenizer, reader)
    assert held is not None, stage.name
    metric = protected.metrics_of(held)[0]
    return Protected(stage.name, stage.config, held, metric, tasks.higher_is_better(metric), margin)


def place(attempt: Path, whose: str, one: str) -> Path:
    """Where an attempt keeps what a model ("base", "released", "candidate") scores on a set."""
    return attempt / "results" / whose / f"{one}.json"


def read(sets: Sequence[Protected], places: Sequence[tuple[Path, str]]) -> Results:
    """What is known: of each set the first of these (attempt, whose) that measured the very same rows in the same way."""
    found: Results = {}
    for one in sets:
        for attempt, whose in places:
            path = place(attempt, whose, one.name)
            known = tasks.from_json(path.read_text("utf-8"), _asked(one)) if path.exists() else None
            if known is not None:
                found[one.name] = known
                break
    return found


def keep(attempt: Path, whose: str, sets: Sequence[Protected], results: Results) -> None:
    """Writes what a model scores on each of these sets."""
    for one in sets:
        write_whole(place(attempt, whose, one.name), tasks.to_json(results[one.name], _asked(one)))


def _asked(one: Protected) -> str:
    """A hash of how a set is measured, and on which rows; whose weights they are it does not say."""
    config, plain = one.config.copy_and_resolve_references(), config_lib.base()
    config.model, config.tune.adapter = plain.model, ""
    return measure.asked(config, one.held)


def of_training(run: Path, one: Protected) -> tuple[tasks.Result, tasks.Result] | None:
    """What the training run measured on its own held-out rows, before and after; None where those are not the set's rows."""
    before_file, after_file = run / "before.json", run / "predictions.jsonl"
    if not before_file.exists() or not after_file.exists():
        return None
    before = tasks.from_json(text := before_file.read_text("utf-8"), json.loads(text)["asked"])
    assert before is not None
    if {row["row_id"] for row in before.rows} != {example.row_id for example in one.held.examples}:
        return None
    rows, options = tasks.read_predictions(after_file, "after"), measure.intervals(one.config)
    return before, tasks.measured(tuple(before.metrics), rows, before.labels, **options)


def measured(
    config: ConfigDict, sets: Sequence[Protected], tokenizer: Tokenizer, show: Any, what: str, say: Any
) -> Results:
    """Loads the model that a config names, and measures it on these sets.

    Raises:
      UserError: a row that the model cannot take.
    """
    if not sets:
        return {}
    say(f"measuring {what} on {', '.join(one.name for one in sets)}")
    model = source.find(config)
    program, values = start.program(config, model)
    for one in sets:
        measure.check(one.config, one.held, tokenizer, program)
    state, frozen = start.load(config, model, program, values, show)
    return protected.measure(list(sets), tokenizer, program, {**frozen, **state.params}, show, what)
