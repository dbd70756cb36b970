"""What a round changed: scores of the model before and after on the same rows, and a blind comparison of the two by people."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import statistics
from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, templates
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, protected, tasks
from jaxtune.evals.protected import Protected, Verdict
from jaxtune.guidance import folder as folder_lib
from jaxtune.guidance import sampling
from jaxtune.guidance.folder import Round
from jaxtune.guidance.sampling import Pool
from jaxtune.lineage import scores
from jaxtune.review import ranking, rounds
from jaxtune.review.record import Item, make_item
from jaxtune.review.record import Verdict as Answer
from jaxtune.review.tasks import Task
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source

HELD_OUT = "held-out"  # the name of the user's own rows among the sets
OLD, NEW = "before", "after"
COMPARISON = "comparison"  # what an item's origin says it is of


class Measured(NamedTuple):
    """The sets with each model's results, and after against before."""

    sets: list[Protected]
    before: dict[str, tasks.Result]
    after: dict[str, tasks.Result]
    verdicts: dict[str, Verdict]


def sets(config: ConfigDict, pool: Pool, tokenizer: Tokenizer, show: Any) -> list[Protected]:
    """The user's own held-out rows, and the protected sets.

    Raises:
      UserError: rows that their metric cannot measure, or a protected set of that name.
    """
    own = config.copy_and_resolve_references()
    own.train.objective = "sft"  # however it is trained, it is to answer
    held = measure.held_out(own, pool.held, tokenizer)
    assert held is not None  # sampling.read refuses what has none
    metric = protected.metrics_of(held)[0]
    if any(name == HELD_OUT for name, _ in config.protect.sets):
        raise UserError(
            f"config.protect.sets has {HELD_OUT!r}, which guide calls the rows held out: give the set another name"
        )
    first = Protected(HELD_OUT, own, held, metric, tasks.higher_is_better(metric), 0.0)
    return [first, *protected.read(own, tokenizer, show)]


def measured(
    config: ConfigDict, one: Round, every: list[Protected], asked: Sequence[Example], tokenizer: Tokenizer, show: Any, say: Any
) -> Measured:  # fmt: skip
    """Measures both models on every set, and has both answer `asked`; what the folder has is not measured again."""
    places = [(one.folder, OLD)]
    if one.parent:
        places.append((one.root / f"round_{one.parent:02d}", NEW))
    before = _of_model(
        config, one, folder_lib.policy(config, one, one.parent), OLD, places, every, asked, tokenizer, show, say
    )
    mine = one._replace(lines=[*one.lines, folder_lib.read_json(one.folder / "trained.json")])
    own = folder_lib.policy(config, mine, one.number)
    after = _of_model(config, one, own, NEW, [(one.folder, NEW)], every, asked, tokenizer, show, say)
    return Measured(every, before, after, protected.judge(every, before, after))


def _of_model(
    config: ConfigDict, one: Round, policy: ConfigDict, whose: str, places: Sequence[tuple[Path, str]], every: list[Protected],
    asked: Sequence[Example], tokenizer: Tokenizer, show: Any, say: Any,
) -> dict[str, tasks.Result]:  # fmt: skip
    known = scores.read(every, places)
    missing = [each for each in every if each.name not in known]
    answers = _answers_file(one, whose)
    unanswered = [] if answers.exists() else list(asked)
    if missing or unanswered:
        say(f"round {one.number}: measuring the model {whose} training")
        model = source.find(policy)
        program, values = start.program(policy, model)
        for each in missing:
            measure.check(each.config, each.held, tokenizer, program)
        ids = [templates.prompt_ids(example, tokenizer) for example in unanswered]
        measure.check_prompts(config, program, [example.row_id for example in unanswered], ids)
        state, frozen = start.load(policy, model, program, values, show)
        params = {**frozen, **state.params}
        known |= protected.measure(missing, tokenizer, program, params, show, whose)
        if unanswered:
            texts = measure.generator(config, tokenizer, program, params, show, f"answering, {whose}")(ids)
            told = folder_lib.told_model(policy, one.parent if whose == OLD else one.number)
            folder_lib.write_json(answers, {"model": told, "texts": [text.strip() for text in texts]})
    scores.keep(one.folder, whose, every, known)
    return {each.name: known[each.name] for each in every}


def _answers_file(one: Round, whose: str) -> Path:
    return one.folder / "comparison" / f"{whose}.json"


# ---- the blind comparison ----


def asked(config: ConfigDict, pool: Pool) -> list[Example]:
    """The held-out prompts that both models answer for people to compare."""
    if not config.guide.compare_task or not config.guide.compare_rows:
        return []
    return pipeline.limited(getattr(pool.held, config.eval.split), config.guide.compare_rows)


def comparison_items(one: Round, task: Task, examples: Sequence[Example]) -> list[Item]:
    """Both models' answers side by side, under ids that do not tell which is whose; equal answers are not asked about."""
    both = {whose: folder_lib.read_json(_answers_file(one, whose)) for whose in (OLD, NEW)}
    found = []
    for example, old, new in zip(examples, both[OLD]["texts"], both[NEW]["texts"], strict=True):
        if old == new:
            continue
        swapped = zlib.crc32(f"{one.number} {example.row_id}".encode()) % 2
        ids = {"a": NEW, "b": OLD} if swapped else {"a": OLD, "b": NEW}
        texts = {OLD: old, NEW: new}
        prompt = sampling.prompt_of(example)
        payload = {"prompt": prompt, "candidates": [{"id": key, "text": texts[whose]} for key, whose in ids.items()]}
        origin = {
            "of": COMPARISON, "row": example.row_id, "prompt": prompt, "sides": ids,
            "models": {key: both[whose]["model"] for key, whose in ids.items()},
        }  # fmt: skip
        found.append(make_item(one.number, task.name, payload, origin, overlap=task.overlap, skill=task.skill))
    return found


def won(items: Sequence[Item], verdicts: Sequence[Answer], task: Task, num_asked: int) -> dict[str, Any]:
    """How often the new model's answer was preferred, an item each by what more than half said; equal answers are ties.

    `rate` is (wins + ties / 2) / all with Wilson's interval; p is of the exact sign test, ties apart.
    """
    made = rounds.made(items, verdicts, {task.name: task}, None, rounds.Rules(flags_out=()))
    by_id = {item.id: item for item in items}
    wins = losses = 0
    for row in made.rows["pairs"]:
        item = by_id[row["item"]]
        texts = {one["text"]: item.origin["sides"][one["id"]] for one in item.payload["candidates"]}
        wins, losses = wins + (texts[row["chosen"]] == NEW), losses + (texts[row["chosen"]] == OLD)
    reasons = [one["reason"] for one in made.left_out]
    open_ones = sum(reason in ("no_verdict", "skipped") for reason in reasons)
    same = num_asked - len(items)
    ties = len(reasons) - open_ones + same
    rate = ranking.win_rate(wins, ties, losses)
    new_M = np.arange(wins + losses) < wins
    first = _shown_first(by_id, verdicts)
    return {
        "wins": wins, "ties": ties, "losses": losses, "same_answers": same, "unanswered": open_ones,
        "rate": rate._asdict(), "p": statistics.mcnemar(~new_M, new_M) if wins + losses else 1.0, "verdicts": len(verdicts), "people": len({one.person for one in verdicts}),
        "seconds": round(sum(one.seconds for one in verdicts), 1), "shown_first": first,
    }  # fmt: skip


def _shown_first(items: Mapping[str, Item], verdicts: Sequence[Answer]) -> dict[str, Any]:
    """How often the answer that stood first won: sides are drawn, so a half is no bias."""
    wins = [0, 0]
    for one in verdicts:
        order = one.shown.get("order") or []
        if one.kind != "compare" or len(order) != 2 or len(one.answer["order"]) != 2 or one.answer.get("bad"):
            continue
        wins[order.index(one.answer["order"][0][0])] += 1
    found = ranking.position_bias(*wins)
    return {"decided": found.decided, "share": found.share._asdict(), "p": found.p}
