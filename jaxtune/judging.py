"""The verb `judge`: outputs of two models side by side, judged blind by people and by a model judge, until one is better or neither is.

WORKDIR holds `outputs/` (what each model said, unless files of outputs were given), `review.db` unless `review.database` names
another, `judging.json` and `report.html`. The same command goes on where it stopped: outputs, items and verdicts that are there
stay. People answer on the page that the verb `review` serves.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import config as config_lib
from jaxtune import fetch, report, verbs
from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, privacy, templates
from jaxtune.data.formats import Example, read_examples
from jaxtune.data.sources import read_rows
from jaxtune.evals import pairwise
from jaxtune.review import answers as answers_lib
from jaxtune.review import endpoint, model_judge, ranking, sequential, store, tasks
from jaxtune.review.model_judge import Asked, Trust
from jaxtune.review.record import Item, Person, make_item
from jaxtune.review.sequential import Decision
from jaxtune.review.store import Engine
from jaxtune.review.tasks import Task
from jaxtune.statistics import Estimate
from jaxtune.train import guests
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.workdir import write_lines, write_whole

_TEXTS = ("generation", "answer", "output", "completion")  # columns of a file of outputs, the first that is there
_AT_ONCE = 64  # items that a local judge is asked before their verdicts are kept


class Output(NamedTuple):
    """What a model said to one prompt; `prompt` is a text or a chat."""

    row_id: str
    prompt: Any
    text: str


class Found(NamedTuple):
    """What there is to report. people, judged: outcomes by item in their order, 1 = the second model is better."""

    items: list[Item]
    alike: int
    people: dict[str, float]
    judged: dict[str, float]
    decision: Decision
    trust: Trust | None
    together: Decision | None
    corrected: Estimate | None
    num_people: int


def judge(config: ConfigDict, workdir: Path) -> None:
    """Asks, reads what was answered, and says whether one of the two is better.

    Raises:
      UserError: outputs, task or endpoint are not in order, or the endpoint went silent: the same command goes on.
    """
    task, options = _task(config), config.judging
    key = endpoint.key_of(options.key_variable) if options.judge.startswith("http") else ""
    first, second = _outputs(config, workdir)
    items, alike = _items(config, task, first, second)
    with store.opened(config.review.database or str(workdir / "review.db")) as engine:
        guideline = tasks.guideline(task)
        number = store.set_guideline(engine, task.name, guideline) if guideline else 0
        store.add_items(engine, items)
        judge_person = _ask_model(config, engine, items, guideline, number, key) if options.judge else None
        while True:
            found = _look(config, engine, task, items, alike, judge_person)
            is_over = _decided(found).decision != sequential.OPEN or len(found.people) == len(items)
            if is_over or not options.follow_seconds:
                break
            verbs.say(config, f"{len(found.people)} of {len(items)} items judged by people; looking again")
            time.sleep(options.follow_seconds)
    _report(config, workdir, task, found, judge_person)


def _task(config: ConfigDict) -> Task:
    known = {name: task for name, task in tasks.read(config.review.tasks).items() if task.kind == "compare"}
    name = config.judging.task or (next(iter(known)) if len(known) == 1 else "")
    if name not in known:
        there = ", ".join(known) or "none"
        raise UserError(
            f"judging.task={config.judging.task!r}; expected a task of kind 'compare' in review.tasks (there: {there}), "
            "e.g. review.tasks=(('better', (('kind', 'compare'),)),)"
        )
    return known[name]


# ---- what is compared ----


def _outputs(config: ConfigDict, workdir: Path) -> tuple[list[Output], list[Output]]:
    """What both said to the same prompts, those that both have, in the prompts' order."""
    given = [config.judging.first, config.judging.second]
    if given[0] == given[1]:
        raise UserError(f"judging.first and judging.second are both {given[0]!r}; expected two that differ")
    prompts = _prompts(config)
    files = [uri if _is_file(uri) else _generated(config, workdir, uri, prompts) for uri in given]
    private = privacy.of(config.privacy)
    sides = [_read_outputs(file, prompts, private) for file in files]
    by_row = {one.row_id: one for one in sides[1]}
    shared = [(one, by_row[one.row_id]) for one in sides[0] if one.row_id in by_row]
    if not shared:
        ids = [side[0].row_id if side else "none" for side in sides]
        raise UserError(
            f"the two sides have no row in common (row_id {ids[0]!r} and {ids[1]!r}, for instance); expected outputs to the same prompts"
        )
    for one, other in shared:
        if one.prompt != other.prompt:
            raise UserError(
                f"{one.row_id} has different prompts on the two sides; expected outputs to the same prompts"
            )
    chosen = sorted(shared, key=lambda pair: hashlib.sha256(pair[0].row_id.encode()).digest())
    kept = {pair[0].row_id for pair in (chosen[: config.judging.limit] if config.judging.limit else chosen)}
    shared = [pair for pair in shared if pair[0].row_id in kept]
    return [one for one, _ in shared], [other for _, other in shared]


def _is_file(uri: str) -> bool:
    return uri.rsplit("#", 1)[-1].endswith((".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet"))


def _prompts(config: ConfigDict) -> list[Example]:
    """Those of `judging.prompts`; else, where a model is to answer, the rows of `eval.split`."""
    if config.judging.prompts:
        examples = read_examples(
            fetch.local(config.judging.prompts), config.data, answers=False, private=privacy.of(config.privacy)
        )[0]
    elif _is_file(config.judging.first) and _is_file(config.judging.second):
        return []
    elif not config.data.train:
        raise UserError("judging.prompts and data.train are empty, and a side is no file of outputs; expected prompts")
    else:
        tokenizer = source.find_tokenizer(config, source.find(config))
        examples = getattr(rows_lib.load(config, tokenizer, verbs.progress(config)), config.eval.split)
    if not examples:
        raise UserError(f"eval.split={config.eval.split!r} has no rows; set judging.prompts or data.test_fraction")
    return pipeline.limited(examples, config.judging.limit)


def _shown(example: Example) -> Any:
    """A prompt as an expert is to see it: the chat before the answer, or the text."""
    if example.messages is None:
        return example.text or example.prompt
    turns = [{"role": str(m["role"]), "content": str(m.get("content") or "")} for m in templates.before_answer(example)]
    return turns[0]["content"] if len(turns) == 1 else turns


def _read_outputs(uri: str, prompts: Sequence[Example], private: privacy.Private | None) -> list[Output]:
    """The lines of a file of outputs; its prompts are those of `judging.prompts`, by row_id, or in their order where it has none.

    Both are made private: people see them, and a judge that may be somebody else's.
    """
    path = fetch.local(uri)
    shown = {example.row_id: _shown(example) for example in prompts}
    ids, found, seen = list(shown), [], set[str]()
    for at, (number, row) in enumerate(read_rows(path)):
        text = next((row[name] for name in _TEXTS if name in row), None)
        if not isinstance(text, str):
            raise UserError(
                f"{path.name}:{number}: no text in {', '.join(_TEXTS)}; expected lines as `generate` writes"
            )
        row_id = str(row["row_id"]) if "row_id" in row else ids[at] if at < len(ids) else str(at + 1)
        if shown and row_id not in shown:
            continue
        prompt = shown.get(row_id, row.get("messages") or row.get("prompt"))
        if prompt is None:
            raise UserError(f"{path.name}:{number}: no prompt; expected a column `prompt`, or judging.prompts")
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt))):
            raise UserError(
                f"{path.name}:{number}: the prompt is {prompt!r:.60}; expected a text or a list of messages"
            )
        if row_id in seen:
            raise UserError(
                f"{path.name}:{number}: the row_id {row_id!r} is there twice; expected one output to a prompt"
            )
        seen.add(row_id)
        asked = {"prompt": prompt, "text": text}
        found.append(Output(row_id, **(private.row(asked)[0] if private else asked)))
    return found


def _generated(config: ConfigDict, workdir: Path, uri: str, prompts: Sequence[Example]) -> str:
    """The file of what a model says to the prompts; made once, kept in the workdir under a name that follows from all it depends on."""
    own = _config_of(config, workdir, uri)
    sections = {name: own[name].to_dict() for name in ("model", "tune", "generate")}
    asked = json.dumps([uri, own.workdir, sections, [str(_shown(one)) for one in prompts]], default=list)
    file = workdir / "outputs" / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.jsonl"
    if not file.exists():
        texts, _, _ = verbs.answered(own, prompts)
        lines = [{"row_id": e.row_id, "generation": text} for e, text in zip(prompts, texts, strict=True)]
        write_lines(file, lines)
    return str(file)


def _config_of(config: ConfigDict, workdir: Path, uri: str) -> ConfigDict:
    """The config of one side: a run's own with its checkpoints, or this one with another adapter or model."""
    folder = Path(uri).expanduser()
    run = folder / "config.json"
    if uri and run.is_file() and "tune" in json.loads(run.read_text("utf-8")):
        own = config_lib.from_json(run.read_text("utf-8"))
        own.workdir, own.export.checkpoint = str(folder), "best"
        own.generate, own.tracking, own.mesh = config.generate, config.tracking, config.mesh
        return guests.none(own)
    own = guests.none(config)
    own.workdir = str(workdir / "outputs" / "none")  # where there are no checkpoints
    if (folder / "adapter_config.json").is_file():
        own.tune.method, own.tune.adapter = "lora", uri
    elif uri:
        own.model.source, own.tune.adapter = uri, ""
    return own


def _items(config: ConfigDict, task: Task, first: Sequence[Output], second: Sequence[Output]) -> tuple[list[Item], int]:
    """A comparison of each two outputs, and how many outputs are alike, which nobody is asked about.

    Which of the two is candidate "a" is drawn by a hash of the row: ids say nothing of models.
    """
    found: dict[str, Item] = {}
    alike = 0
    for one, other in zip(first, second, strict=True):
        if one.text.strip() == other.text.strip():
            alike += 1
            continue
        is_swapped = hashlib.sha256(f"{config.train.seed}\0{one.row_id}".encode()).digest()[0] % 2
        sides = [(one.text, 0), (other.text, 1)][:: -1 if is_swapped else 1]
        candidates = [{"id": name, "text": text} for name, (text, _) in zip("ab", sides, strict=True)]
        given = (config.judging.first or config.model.source, config.judging.second or config.model.source)
        models = {
            name: {"model": config.judging.names[at], "checkpoint": given[at]}
            for name, (_, at) in zip("ab", sides, strict=True)
        }
        payload = {"prompt": one.prompt, "candidates": candidates}
        origin = {"source": config.judging.prompts, "row": one.row_id, "models": models}
        item = make_item(config.review.round, task.name, payload, origin, overlap=task.overlap, skill=task.skill)
        found[item.id] = item
    if not found:
        raise UserError(f"all {alike} outputs are alike on the two sides; there is nothing to compare")
    return list(found.values()), alike


# ---- the model judge ----


def _ask_model(
    config: ConfigDict, engine: Engine, items: Sequence[Item], guideline: str, number: int, key: str
) -> Person:
    """Has the judge fill in what it has not filled in yet; returns the person that its verdicts are of."""
    options = config.judging
    template = Path(options.question).expanduser().read_text("utf-8") if options.question else model_judge.QUESTION
    if missing := [name for name in ("prompt", "first", "second") if f"{{{name}}}" not in template]:
        raise UserError(f"judging.question={options.question!r} lacks {{{missing[0]}}}; the text must hold it")
    named = options.judge_model or config.model.source
    who = model_judge.person(options.judge, named, template + guideline)
    model_judge.enter(engine, who)
    done = {v.item for v in store.read_verdicts(engine, config.review.round, models=True) if v.person == who.id}
    left = [item for item in items if item.id not in done]
    verbs.say(config, f"{who.name}: {len(items) - len(left)} of {len(items)} items are judged, {len(left)} to go")
    if not left:
        return who
    if options.judge == "local":
        _ask_local(config, engine, who, left, template, guideline, number)
        return who
    ask = endpoint.client(options.judge, options.judge_model, key, options.timeout_seconds, options.retries)
    asked = (ask, template, guideline, number, options.parallel)
    try:
        counts = model_judge.fill_by_endpoint(engine, who, left, *asked)
    except ConnectionError as error:
        raise UserError(
            f"the judge {options.judge} has stopped answering ({error}); what it said is kept, the same command goes on"
        ) from None
    if counts["skipped"]:
        verbs.say(config, f"{counts['skipped']} items got no answer that can be read; the same command asks again")
    return who


def _ask_local(
    config: ConfigDict, engine: Engine, who: Person, items: Sequence[Item], template: str, guideline: str, number: int
) -> None:
    score = pairwise.load(config, config.judging.judge_model, verbs.progress(config))
    question = partial(model_judge.question, template, guideline)
    for at in range(0, len(items), _AT_ONCE):
        some, began = items[at : at + _AT_ONCE], time.monotonic()
        orders = [[str(one["id"]) for one in item.payload["candidates"]] for item in some]
        texts = [question(item, ids) for item, ids in zip(some, orders, strict=True)]
        logits = score([*texts, *(question(item, ids[::-1]) for item, ids in zip(some, orders, strict=True))])
        seconds = (time.monotonic() - began) / len(some)
        for item, forth, back in zip(some, logits[: len(some)], logits[len(some) :], strict=True):
            said = model_judge.verdict(who, item, _letter(forth), _letter(back), seconds, number)
            store.add_verdict(engine, said)


def _letter(logit: float) -> Asked:
    if logit != logit:
        return Asked("", None, "the question is longer than the model knows")
    return Asked("A" if logit > 0 else "B" if logit < 0 else "C", float(logit))


# ---- what was answered ----


def _look(config: ConfigDict, engine: Engine, task: Task, items: list[Item], alike: int, who: Person | None) -> Found:
    """The outcomes so far, and what they say; a judge that is trusted counts where no person has judged."""
    options, ids = config.judging, {item.id for item in items}
    said = [v for v in store.read_verdicts(engine, config.review.round, task.name) if v.item in ids]
    given = answers_lib.given(task, items, said)
    complete = answers_lib.complete(items, given)
    scores = answers_lib.outcomes(answers_lib.games(given), options.names[1], options.names[0])
    people = {item: scores[item] for item in complete}
    decision = sequential.decide(list(people.values()), options.alpha, options.margin)
    num_people = len({v.person for _, v in given})
    if who is None:
        return Found(items, alike, people, {}, decision, None, None, None, num_people)
    theirs = store.read_verdicts(engine, config.review.round, task.name, models=True)
    own = answers_lib.given(task, items, [v for v in theirs if v.person == who.id])
    judged = answers_lib.outcomes(answers_lib.games(own), options.names[1], options.names[0])
    trust = model_judge.trust(people, judged, [v for _, v in own], options.trust)
    alone = [x for item, x in judged.items() if item not in people]
    both = [item for item in people if item in judged]
    corrected = (
        ranking.corrected([people[i] for i in both], [judged[i] for i in both], alone) if len(both) > 1 else None
    )
    together = sequential.decide([*people.values(), *alone], options.alpha, options.margin) if trust.trusted else None
    return Found(items, alike, people, judged, decision, trust, together, corrected, num_people)


def _decided(found: Found) -> Decision:
    """People's decision; where it is open, that with a judge who is trusted."""
    return found.decision if found.decision.decision != sequential.OPEN or not found.together else found.together


def _report(config: ConfigDict, workdir: Path, task: Task, found: Found, who: Person | None) -> None:
    from jaxtune.review import judging_page

    facts: dict[str, Any] = judging_page.facts(config, task, found, who.name if who else "")
    told = {name: facts[name] for name in ("headline", "figures")}
    write_whole(workdir / "judging.json", json.dumps(told, indent=2) + "\n")
    report.write(workdir, facts)
    print("\n".join([facts["headline"], *facts["lines"], f"report in {workdir / 'report.html'}"]))
