"""Verdicts to files that `train` reads unchanged, and the config of the run that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune import checkpoint
from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.guidance import folder as folder_lib
from jaxtune.guidance.folder import Round
from jaxtune.review import rounds
from jaxtune.review.record import FLAG_TYPES, Item, Verdict
from jaxtune.review.tasks import Task
from jaxtune.types import UserError
from jaxtune.workdir import write_lines

# Kinds of rows that an objective learns from, all in one file; of sft the first that there are.
LEARNS = {
    "sft": ("sft", "texts"), "kto": ("kto",), "reward": ("rewards", "pairs"), **dict.fromkeys(("dpo", "cpo", "simpo", "orpo"), ("pairs",)),
}  # fmt: skip
_FORMATS = {
    "sft": "prompt_completion",
    "texts": "text",
    "pairs": "preference",
    "kto": "prompt_completion",
    "rewards": "preference",
}
BESIDE = (
    "guide:"  # train.beside=(("dpo", 0.5, "guide:pairs"),) learns from rows of the round beside the main objective's
)
_RULES = ("guide.keep_flagged", "guide.edits", "guide.pairs_from_edits", "guide.repeat_agreed", "guide.trust")


def wanted(config: ConfigDict) -> tuple[str, ...]:
    """Kinds of rows that the run learns from.

    Raises:
      UserError: it learns from none that experts make.
    """
    objective = config.train.objective
    if objective not in LEARNS:
        raise UserError(
            f"guide makes rows for {', '.join(LEARNS)}, and train.objective={objective!r} learns from none of them: set one of those"
        )
    beside = [entry[2] for entry in config.train.beside if len(entry) > 2 and str(entry[2]).startswith(BESIDE)]
    kinds = [str(uri).removeprefix(BESIDE) for uri in beside]
    wrong = next((kind for kind in kinds if kind not in rounds.KINDS), None)
    if wrong is not None:
        raise UserError(f"train.beside names {BESIDE}{wrong}; expected {BESIDE} and one of {', '.join(rounds.KINDS)}")
    return tuple(dict.fromkeys([*LEARNS[objective], *kinds]))


def check_tasks(config: ConfigDict, tasks: Mapping[str, Task]) -> None:
    """Refuses, before anybody is asked, tasks whose verdicts the run could not learn from.

    Raises:
      UserError: with the first.
    """
    kinds = wanted(config)
    useful = {source for kind in kinds for source in rounds.SOURCES[kind]}
    if not config.guide.pairs_from_edits and "sft" not in kinds:
        useful.discard("edit")
    for task in tasks.values():
        if task.kind not in useful:
            raise UserError(
                f"task {task.name!r} is of kind {task.kind!r}, from which train.objective={config.train.objective!r} learns nothing "
                f"(it learns from {', '.join(sorted(useful))}): leave it out of guide.tasks, or choose another objective"
            )


def write(
    config: ConfigDict, one: Round, items: Sequence[Item], verdicts: Sequence[Verdict], tasks: Mapping[str, Task],
    people: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Writes the round's data, or finds it; returns what is to be told of it.

    Args:
      people: names by id.

    Raises:
      UserError: a file was changed, the rules are others, nothing is left to train on, or guide.trust names nobody.
    """
    folder = one.folder / "data"
    about = folder / "data.json"
    if about.exists():
        told: dict[str, Any] = folder_lib.read_json(about)
        others = tuple(key for key in config_lib.keys(config) if key not in _RULES)
        folder_lib.check_same(told["config"], config, others, f"the rows of round {one.number} were made")
        for name, file in told["files"].items():
            if not (folder / name).exists() or folder_lib.sha256(folder / name) != file["sha256"]:
                raise UserError(
                    f"{folder / name} is gone or was changed since round {one.number} made it: put it back as it was, or delete "
                    f"{about} and it is made anew from the verdicts"
                )
        return told
    ids = {name: person for person, name in people.items()}
    unknown = next((name for name, _ in config.guide.trust if name not in ids), None)
    if unknown is not None:
        raise UserError(
            f"guide.trust names {unknown!r}, whom the review database does not know; it has {', '.join(ids)}"
        )
    trust = {ids[name]: float(weight) for name, weight in config.guide.trust}
    out = tuple(kind for kind in FLAG_TYPES if kind not in config.guide.keep_flagged)
    guide = config.guide
    rules = rounds.Rules(out, guide.edits, guide.pairs_from_edits, guide.repeat_agreed)
    made = rounds.made(items, verdicts, tasks, trust, rules)
    _check_enough(config, made, len(verdicts))
    texts = {f"{kind}.jsonl": rows for kind, rows in made.rows.items() if rows}
    texts |= {
        "left_out.jsonl": made.left_out,
        "flagged.jsonl": made.flagged,
        "verdicts.jsonl": [v._asdict() for v in verdicts],
    }
    train = _train_rows(config, made.rows)
    for name, rows in (texts | {"train.jsonl": train}).items():
        write_lines(folder / name, rows)
    told = {
        "files": {name: {"rows": len(rows), "sha256": folder_lib.sha256(folder / name)} for name, rows in (texts | {"train.jsonl": train}).items()},
        "left_out": made.counts(), "flagged": len(made.flagged), "verdicts": len(verdicts),
        "people": len({one.person for one in verdicts}), "seconds": round(sum(one.seconds for one in verdicts), 1),
        "config": json.loads(config_lib.to_json(config)),
    }  # fmt: skip
    folder_lib.write_json(about, told)
    return told


def _check_enough(config: ConfigDict, made: rounds.Made, num_verdicts: int) -> None:
    if not num_verdicts:
        raise UserError("no verdict was given in this round: there is nothing to train on")
    main = [row for kind in LEARNS[config.train.objective] for row in made.rows[kind]]
    if not main:
        counted = "; ".join(
            f"{task}: " + ", ".join(f"{num} {reason} ({rounds.REASONS[reason]})" for reason, num in reasons.items())
            for task, reasons in made.counts().items()
        )
        raise UserError(
            f"{num_verdicts} verdicts gave no row that train.objective={config.train.objective!r} learns from: {counted or 'none was left out'}"
        )
    missing = next(
        (kind for kind in wanted(config) if kind not in LEARNS[config.train.objective] and not made.rows[kind]), None
    )
    if missing is not None:
        raise UserError(f"train.beside learns from {BESIDE}{missing}, and the verdicts gave no such row: leave it out")


def _train_rows(config: ConfigDict, rows: Mapping[str, list[Any]]) -> list[Any]:
    kinds = LEARNS[config.train.objective]
    if config.train.objective == "sft":
        kinds = tuple(kind for kind in kinds if rows[kind])[:1]
    return [row for kind in kinds for row in rows[kind]]


def run_config(config: ConfigDict, one: Round) -> ConfigDict:
    """The config of the round's run: on its rows, from the model that it starts from."""
    made, data = folder_lib.policy(config, one, one.parent), one.folder / "data"
    plain = config_lib.base()
    made.name, made.workdir = f"{config.name}, round {one.number}", str(one.folder / "train")
    for key in (
        "eval", "test", "files", "prepare", "columns", "prompt", "passage", "negative", "system", "label_column",
        "label_separator", "label_bins", "split_regex", "limit",
    ):  # fmt: skip
        made.data[key] = plain.data[key]
    learns = LEARNS[config.train.objective]
    kinds = [kind for kind in learns if (data / f"{kind}.jsonl").exists()] or learns  # none before rows are made
    made.data.train, made.data.format, made.data.split_key = str(data / "train.jsonl"), _FORMATS[kinds[0]], "item"
    validates = made.train.patience or made.train.eval_every_steps
    made.data.validation_fraction = config.data.validation_fraction if validates else 0.0
    measures = config.train.objective == "reward"  # other results are measured on the user's own held-out rows
    made.data.test_fraction = config.data.test_fraction if measures else 0.0
    made.eval.metric, made.eval.before_after = "auto", measures
    made.train.beside = tuple(
        (*entry[:2], str(data / f"{entry[2].removeprefix(BESIDE)}.jsonl"))
        if len(entry) > 2 and entry[2].startswith(BESIDE)
        else entry
        for entry in config.train.beside
    )
    if config.protect.on_broken == "report" and not config.protect.every_steps:
        made.protect.sets = ()  # they are measured after the run, row by row
    made.export.output, made.guide, made.review = "", plain.guide, plain.review
    made.tracking.report = True
    made.checkpoint.resume = checkpoint.is_used(made.workdir)
    return made


def claim(config: ConfigDict, one: Round, made: ConfigDict) -> None:
    """Writes the run's config, or finds that it is the one that the run began by.

    Raises:
      UserError: it is another, and steps were taken by the first.
    """
    path = one.folder / "train.json"
    if path.exists() and made.checkpoint.resume:
        folder_lib.check_same(
            json.loads(path.read_text("utf-8")), made, checkpoint.free(made), f"round {one.number} began to train"
        )
        return
    folder_lib.write_json(path, json.loads(config_lib.to_json(made)))


def result(one: Round) -> Path | None:
    """The folder of the weights that the run exported; None where it was refused or is not done."""
    found = (one.folder / "train" / name for name in ("adapter", "model"))
    return next((path for path in found if path.is_dir()), None)


def is_reward_model(config: ConfigDict) -> bool:
    return str(config.train.objective) == "reward"
