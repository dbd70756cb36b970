"""What experts are asked: rows of the user's data, and outputs of the model of the moment, as items.

Outputs are made in parts of prompts, each a file that is whole or not there; what is drawn depends on the seed, the round, the task
and the prompt, not on which parts were there before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, privacy, templates
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import likelihood
from jaxtune.generate.logits import Sampling
from jaxtune.generate.rollout import Roller
from jaxtune.guidance import folder as folder_lib
from jaxtune.guidance.folder import Round
from jaxtune.review.record import Item, make_item
from jaxtune.review.tasks import Task
from jaxtune.train import rows as rows_lib
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.workdir import read_lines, write_lines

PART_PROMPTS = 64  # prompts whose outputs are written together: what a kill costs at most


class Pool(NamedTuple):
    """Rows that may be asked about, rows held out to measure on, and a hash of both."""

    train: list[Example]
    held: pipeline.Splits
    digest: str


class Model(NamedTuple):
    """A loaded model: its outputs to prompts, and what it gives each of some labels; and how it is told of in an item."""

    outputs: Callable[[Sequence[Sequence[int]], int, int], list[str]]
    labels: Callable[[Sequence[Example], Sequence[str]], np.ndarray]


class Sampled(NamedTuple):
    """Items of a round, and what rows gave none, {task: {reason: number}}; seconds that it took."""

    items: list[Item]
    left_out: dict[str, dict[str, int]]
    seconds: float


def read(config: ConfigDict, tokenizer: Tokenizer, show: Any) -> Pool:
    """Reads `data.train` by its own split.

    Raises:
      UserError: bad data, or none held out.
    """
    private = privacy.of(config.privacy)  # before people or a model see anything
    paths = rows_lib.paths(config)
    splits = pipeline.load(config.data, paths, tokenizer, show, keep_rows=True, answers=False, private=private)
    if not getattr(splits, config.eval.split):
        raise UserError(
            f"guide measures each round on held-out rows, and eval.split={config.eval.split!r} has none: set data.test_fraction or data.test"
        )
    rows = [[one.row_id, one.messages, one.prompt, one.text, one.answer] for split in splits[:3] for one in split]
    return Pool(splits.train, splits, folder_lib.sha256(rows))


def check(config: ConfigDict, tasks: Mapping[str, Task]) -> None:
    """Refuses settings by which a task would have nothing to show.

    Raises:
      UserError: with the field to change.
    """
    guide = config.guide
    for task in tasks.values():
        if task.kind == "rate" and guide.answers == "rows":
            raise UserError(
                f"task {task.name!r} rates answers, and guide.answers='rows' shows one to each prompt, which is better than none: set 'outputs'"
            )
        several = task.kind == "rate" or (task.kind == "compare" and not guide.against)
        if several and (guide.candidates < 2 or guide.temperature == 0):
            raise UserError(
                f"task {task.name!r} needs outputs that differ, and guide.candidates={guide.candidates} at guide.temperature="
                f"{guide.temperature:g} gives none: set two or more, at a temperature above 0"
            )


def items(
    config: ConfigDict, one: Round, tasks: Mapping[str, Task], pool: Pool, tokenizer: Tokenizer, show: Any, say: Any
) -> Sampled:
    """The round's items: those that its folder has, else new ones, which it then has.

    Raises:
      UserError: a row that cannot be asked about, or a task that no row is left for.
    """
    path, about = one.folder / "items.jsonl", one.folder / "sampled" / "about.json"
    if path.exists():
        known = folder_lib.read_json(about)
        return Sampled([Item(**line) for line in read_lines(path)], known["left_out"], known["seconds"])
    began, models = time.monotonic(), _models(config, one, tokenizer, show)
    seen = _asked_before(one)
    found: list[Item] = []
    left_out: dict[str, dict[str, int]] = {}
    for number, task in enumerate(tasks.values()):
        rows = _choose(config, pool.train, seen.get(task.name, set()), number, len(tasks))
        if not rows:
            raise UserError(
                f"task {task.name!r}: no training row is left that no round has asked about ({len(pool.train):,} are there): name more "
                f"rows as data.train, or set guide.rows lower"
            )
        say(f"round {one.number}: {len(rows)} rows for the task {task.name!r}")
        made, lost = _task_items(config, one, task, rows, tokenizer, models, show)
        found, left_out[task.name] = [*found, *made], dict(lost)
    unique = list({item.id: item for item in found}.values())
    for name, num in (Counter(item.task for item in found) - Counter(item.task for item in unique)).items():
        left_out[name]["same_as_another"] = num
    sampled = Sampled(unique, left_out, round(time.monotonic() - began, 1))
    folder_lib.write_json(about, {"left_out": left_out, "seconds": sampled.seconds})
    write_lines(path, [item._asdict() for item in unique])
    return sampled


def _asked_before(one: Round) -> dict[str, set[str]]:
    """Rows that earlier rounds asked about, by task."""
    found: dict[str, set[str]] = {}
    for number in range(1, one.number):
        path = one.root / f"round_{number:02d}" / "items.jsonl"
        for line in read_lines(path) if path.exists() else []:
            found.setdefault(line["task"], set()).add(line["origin"]["row_sha256"])
    return found


def _choose(config: ConfigDict, rows: Sequence[Example], seen: set[str], number: int, num_tasks: int) -> list[Example]:
    """Rows for one of several tasks: different ones for each, as long as there are enough."""
    left = [example for example in rows if _sha(example) not in seen]
    order = np.random.default_rng([config.train.seed, len(rows)]).permutation(len(left))
    wanted = min(config.guide.rows or len(left), len(left))
    begin = number * wanted if num_tasks * wanted <= len(left) else 0
    return [left[at] for at in order[begin : begin + wanted]]


def _sha(example: Example) -> str:
    return folder_lib.sha256([example.messages, example.prompt, example.text, example.answer])


# ---- items of one task ----


def _task_items(
    config: ConfigDict, one: Round, task: Task, rows: Sequence[Example], tokenizer: Tokenizer,
    models: Callable[[str], tuple[Model, dict[str, Any]]], show: Any,
) -> tuple[list[Item], Counter[str]]:  # fmt: skip
    lost, found = Counter[str](), []
    if task.kind in ("label", "span"):
        suggested = _prelabels(config, one, task, rows, models) if config.guide.prelabels else [None] * len(rows)
        for example, prelabel in zip(rows, suggested, strict=True):
            payload = {"text": _text(example)} | ({"prelabel": prelabel[0]} if prelabel else {})
            item = _item(config, one, task, example, payload, {"prelabel": prelabel[2]} if prelabel else {})
            found.append(item._replace(origin=item.origin | ({"shares": prelabel[1]} if prelabel else {})))
        return found, lost
    own_rows = config.guide.answers == "rows" and task.kind != "compare"
    if own_rows:
        without = next((example for example in rows if example.answer is None), None)
        if without is not None:
            raise UserError(
                f"{without.row_id}: guide.answers='rows' shows the rows' own answers, and this one has none: set 'outputs'"
            )
        for example in rows:
            found.append(
                _item(config, one, task, example, {"prompt": prompt_of(example), "answer": example.answer}, {})
            )
        return found, lost
    for example, texts, made_by in _outputs(config, one, task, rows, tokenizer, models, show):
        if task.kind == "compare":
            said = {text.strip(): made for text, made in zip(texts, made_by, strict=True) if text.strip()}
            if len(said) < 2:
                lost["same_outputs" if said else "empty_output"] += 1
                continue
            candidates = [{"id": chr(ord("a") + at), "text": text} for at, text in enumerate(said)]
            by = {one["id"]: made for one, made in zip(candidates, said.values(), strict=True)}
            found.append(
                _item(config, one, task, example, {"prompt": prompt_of(example), "candidates": candidates}, by)
            )
            continue
        for text, made in zip(texts, made_by, strict=True):
            if not text.strip():
                lost["empty_output"] += 1
                continue
            found.append(
                _item(config, one, task, example, {"prompt": prompt_of(example), "answer": text}, {"answer": made})
            )
    return found, lost


def _item(
    config: ConfigDict, one: Round, task: Task, example: Example, payload: dict[str, Any], models: dict[str, Any]
) -> Item:
    origin = {
        "source": config.data.train, "row": example.row_id, "row_sha256": _sha(example), "prompt": prompt_of(example),
        "answer": example.answer, "models": models,
    }  # fmt: skip
    return make_item(one.number, task.name, payload, origin, overlap=task.overlap, skill=task.skill)


def prompt_of(example: Example) -> Any:
    """What comes before the answer, as the data's formats read it again."""
    if example.messages is not None:
        return [dict(turn) for turn in templates.before_answer(example)]
    return example.prompt.rstrip(" ") or example.text or ""


def _text(example: Example) -> str:
    """What there is to be labelled: a chat's last question."""
    if example.messages is None:
        return example.text or example.prompt
    return str(templates.before_answer(example)[-1]["content"])


# ---- what models say ----


def _models(
    config: ConfigDict, one: Round, tokenizer: Tokenizer, show: Any
) -> Callable[[str], tuple[Model, dict[str, Any]]]:
    """Returns which ("" the round's own, or a URI) -> the loaded model and how items tell of it; one at a time is loaded."""
    loaded: dict[str, tuple[Model, dict[str, Any]]] = {}

    def get(which: str) -> tuple[Model, dict[str, Any]]:
        if which not in loaded:
            loaded.clear()
            asked = folder_lib.policy(config, one, one.parent)
            asked.train.objective, asked.train.beside = "sft", ()
            if config.train.objective == "reward":  # its head scores, and what is rated is to be written
                asked.model.head, asked.model.labels = "", ()
            if which:
                folder = source_is_adapter(which)
                asked.tune.adapter, asked.model.source = (which, config.model.source) if folder else ("", which)
            told = folder_lib.told_model(asked, -1 if which else one.parent)
            loaded[which] = load(asked, tokenizer, show), told
        return loaded[which]

    return get


def source_is_adapter(uri: str) -> bool:
    """Whether a URI names an adapter, and no whole model."""
    from jaxtune import fetch

    return (fetch.local(uri) / "adapter_config.json").exists()


def load(config: ConfigDict, tokenizer: Tokenizer, show: Any) -> Model:
    """Loads the model that a config names."""
    model = source.find(config)
    source.check_writes(model)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, show)
    params, options = {**frozen, **state.params}, config.guide
    places = (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size, program.model_config.max_positions)
    roller = Roller(program.inference, *places, options.slots, program.mesh)
    settings = Sampling(options.temperature, 0, options.top_p)

    def outputs(prompts: Sequence[Sequence[int]], group: int, seed: int) -> list[str]:
        made = roller(params, prompts, group, settings, options.max_new_tokens, seed)
        return [tokenizer.decode(one.tokens[: len(one.tokens) - one.ended]).strip() for one in made]

    def labels(examples: Sequence[Example], names: Sequence[str]) -> np.ndarray:
        both = [templates.continuations(example, tuple(names), tokenizer) for example in examples]
        size = (tokenizer.pad_id, config.eval.batch_size, show, "suggesting labels")
        score = likelihood.label_scorer(program.inference, params, *size)
        scores_MC = score([prompt for prompt, _ in both], [list(candidates) for _, candidates in both])
        shares_MC = np.exp(scores_MC - scores_MC.max(-1, keepdims=True))
        return shares_MC / shares_MC.sum(-1, keepdims=True)

    return Model(outputs, labels)


def _outputs(
    config: ConfigDict, one: Round, task: Task, rows: Sequence[Example], tokenizer: Tokenizer,
    models: Callable[[str], tuple[Model, dict[str, Any]]], show: Any,
) -> list[tuple[Example, list[str], list[dict[str, Any]]]]:  # fmt: skip
    """Each row with its outputs, and which model each is from."""
    against = config.guide.against if task.kind == "compare" else ""
    num = 1 if against or task.kind in ("edit", "accept") else config.guide.candidates
    texts, told = _parts(config, one, task, rows, tokenizer, num, "", models, show)
    if against:
        others, told_other = _parts(config, one, task, rows, tokenizer, 1, against, models, show)
        texts = [[*own, *other] for own, other in zip(texts, others, strict=True)]
        return [(example, own, [told, told_other]) for example, own in zip(rows, texts, strict=True)]
    return [(example, own, [told] * num) for example, own in zip(rows, texts, strict=True)]


def _parts(
    config: ConfigDict, one: Round, task: Task, rows: Sequence[Example], tokenizer: Tokenizer, num: int, which: str,
    models: Callable[[str], tuple[Model, dict[str, Any]]], show: Any,
) -> tuple[list[list[str]], dict[str, Any]]:  # fmt: skip
    """(`num` outputs of a model to each row, how items tell of the model), part by part."""
    folder: Path = one.folder / "sampled" / (f"{task.name}_against" if which else task.name)
    starts = range(0, len(rows), PART_PROMPTS)
    found: list[list[str]] = []
    told: dict[str, Any] = {}
    for start_at in show(starts, len(starts), f"outputs for {task.name}"):
        path = folder / f"part_{start_at // PART_PROMPTS:04d}.json"
        part = rows[start_at : start_at + PART_PROMPTS]
        if not path.exists():
            model, about = models(which)
            ids = [templates.prompt_ids(example, tokenizer) for example in part]
            told_by = [config.train.seed, one.number, start_at, int(bool(which)), *task.name.encode()]
            seed = int(np.random.SeedSequence(told_by).generate_state(1)[0])
            made = model.outputs(ids, num, seed)
            texts = [made[at : at + num] for at in range(0, len(made), num)]
            folder_lib.write_json(path, {"texts": texts, "model": about})
        saved = folder_lib.read_json(path)
        found, told = [*found, *saved["texts"]], saved["model"]
    return found, told


def _prelabels(
    config: ConfigDict, one: Round, task: Task, rows: Sequence[Example],
    models: Callable[[str], tuple[Model, dict[str, Any]]],
) -> list[tuple[dict[str, Any], list[float], dict[str, Any]] | None]:  # fmt: skip
    """(the model's likeliest label of each row with its probability, the probability of each label, the model)."""
    if task.kind != "label" or task.multi:
        return [None] * len(rows)
    model, told = models("")
    found: list[tuple[dict[str, Any], list[float], dict[str, Any]] | None] = []
    for share_C in model.labels(rows, task.labels):
        best = int(share_C.argmax())
        suggested = {"labels": [task.labels[best]], "score": round(float(share_C[best]), 4)}
        found.append((suggested, [round(float(share), 4) for share in share_C], told))
    return found
