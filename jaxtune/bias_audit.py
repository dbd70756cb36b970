"""The verb `audit`: how a model treats groups of people, on the user's own rows and by published measures; several models side by side.

WORKDIR then holds `audit.json` (every figure, every difference), `report.html`, a picture for each part, and `models/NAME.json` (what each
model answered, row by row: the same command measures what is not there). With `audit.augment` the data with counterfactual rows are in
`augmented/`; with `review.database` and flags of bias in it, `flagged_pairs.jsonl` holds preferences to train on (dpo).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune import config as config_lib
from jaxtune import fetch, sweep, tracking
from jaxtune.config import ConfigDict
from jaxtune.data import counterfactual as texts
from jaxtune.data import pipeline, privacy
from jaxtune.data.counterfactual import Axis
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import bias, bias_account, counterfactual, measure
from jaxtune.evals.figures import Figure
from jaxtune.models import reading
from jaxtune.train import guests, start
from jaxtune.train import rows as rows_lib
from jaxtune.train.state import Program
from jaxtune.types import UserError
from jaxtune.weights import source
from jaxtune.weights.source import Model
from jaxtune.workdir import write_lines, write_whole

Template = tuple[str, str, Axis]


class Asked(NamedTuple):
    """What models are asked: versions of the user's rows, questions of BBQ, pairs of CrowS-Pairs; None where a part is not."""

    probes: counterfactual.Probes | None
    labels: tuple[str, ...]  # of the rows, where they are not the model's own
    questions: list[bias.Question] | None
    pairs: list[bias.Sentences] | None
    notices: list[str]


def audit(config: ConfigDict, workdir: Path) -> None:
    """Measures each of `audit.models` (or the config's own) on the same rows, and compares the others with the first.

    Raises:
      UserError: nothing is asked, files are not what they are said to be, rows or models cannot be measured.
    """
    axes = texts.read_axes(config.audit.groups)
    templates = texts.check_templates(config.audit.templates, axes)
    picked = texts.pick(axes, config.audit.axes)
    flags = _flags(config, workdir)
    if not picked and not config.audit.bbq and not config.audit.crows and not flags:
        raise UserError(
            "audit has nothing to ask: set audit.groups (with data.train), audit.bbq, audit.crows, or review.database"
        )
    wanted = [(name, model_config(config, what)) for name, what in config.audit.models or ((_plain(config.name), ""),)]
    asked = _read(config, workdir, picked, templates)
    measured: dict[str, list[Figure]] = {}
    worst, how = {}, {}
    for name, own in wanted if asked.probes or asked.questions or asked.pairs else []:
        answers = _answers(own, workdir, name, asked)
        measured[name], how = _figures(asked, answers), answers["how"]
        if asked.probes:
            given = [counterfactual.Answer(*one) for one in answers["probes"]]
            worst[name] = counterfactual.worst(asked.probes, given, config.audit.worst_rows)
    _write(config, workdir, asked, measured, {"worst": worst, "how": how, "flags": flags, "models": dict(wanted)})


def _plain(name: str) -> str:
    return re.sub(r"[^\w. -]", "_", name)


# ---- what is asked ----


def _read(config: ConfigDict, workdir: Path, axes: Sequence[Axis], templates: Sequence[Template]) -> Asked:
    """Reads the rows, swaps them, and reads the published files; writes the augmented data where they are asked for."""
    options = config.audit
    notices: list[str] = []
    probes: counterfactual.Probes | None = None
    labels: tuple[str, ...] = ()
    if axes:
        model = source.find(config)
        splits = pipeline.load(
            config.data,
            rows_lib.paths(config),
            source.find_tokenizer(config, model),
            _show(config),
            keep_rows=True,
            private=privacy.of(config.privacy),
        )
        labels = _labels(config, splits)
        keep = [one for one in (config.data.label_column, config.data.split_key) if one]
        rows = _rows(config, splits)
        asked_templates = list(templates)
        probes = counterfactual.make(rows, axes, asked_templates, options.columns, keep, options.rows)
        for name, told in probes.counts.items():
            notices.append(
                f"{name}: of {len(rows):,} rows, words were swapped in {told['changed']:,}, none in {told['unchanged']:,}; {told['unsure']:,} left out "
                "because a word could stand for two (her: him or his)."
            )
        if options.augment:
            notices += _augment(config, workdir, splits, axes, asked_templates, keep)
    questions = None
    if options.bbq:
        metadata = fetch.local(options.bbq_metadata) if options.bbq_metadata else None
        questions, without = bias.read_bbq(fetch.local(options.bbq), metadata, options.bbq_categories, options.bbq_rows)
        if without:
            notices.append(
                f"BBQ: {without:,} questions were left out, for nothing says which of their answers is biased."
            )
    pairs = (
        bias.read_crows(fetch.local(options.crows), options.crows_types, options.crows_rows) if options.crows else None
    )
    for notice in notices:
        sweep.say(config, f"note: {notice}")
    return Asked(probes, labels, questions, pairs, notices)


def _rows(config: ConfigDict, splits: pipeline.Splits) -> list[tuple[str, texts.Row]]:
    """The rows to probe as they were read, in an order that is a matter of their ids alone.

    Raises:
      UserError: the split has none.
    """
    split = config.audit.split or config.eval.split
    examples = [*splits.train, *splits.validation, *splits.test] if split == "all" else getattr(splits, split)
    if not examples:
        raise UserError(
            f"there are no {split} rows to probe: set audit.split, or what makes that split (data.test_fraction, data.test, …)"
        )
    return [
        _row(example)
        for example in sorted(examples, key=lambda one: hashlib.blake2b(one.row_id.encode(), digest_size=8).digest())
    ]


def _row(example: Example) -> tuple[str, texts.Row]:
    assert example.row is not None, example.row_id
    return example.row_id, example.row


def _labels(config: ConfigDict, splits: pipeline.Splits) -> tuple[str, ...]:
    if (
        config.eval.labels
        or config.eval.metric not in ("auto", "labels")
        or not (config.data.label_column or config.eval.metric == "labels")
    ):
        return tuple(config.eval.labels)
    return tuple(sorted({example.answer or "" for split in splits[:3] for example in split}))


def _augment(
    config: ConfigDict,
    workdir: Path,
    splits: pipeline.Splits,
    axes: Sequence[Axis],
    templates: Sequence[Template],
    keep: Sequence[str],
) -> list[str]:
    """Writes the splits as files, training rows with their counterfactuals; what to say of it."""
    folder = workdir / "augmented"
    used = (axes if "swaps" in config.audit.augment else (), templates if "templates" in config.audit.augment else ())
    train, counts = texts.augmented([_row(example) for example in splits.train], *used, config.audit.columns, keep)
    files = {"train": train} | {
        split: [_row(example)[1] for example in getattr(splits, split)] for split in ("validation", "test")
    }
    for split, rows in files.items():
        if jax.process_index() == 0 and rows:
            write_lines(folder / f"{split}.jsonl", rows)
    given = " ".join(
        f"--config.data.{key}={folder / split}.jsonl"
        for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))
        if files[split]
    )
    return [
        f"Augmented data in {folder}: {counts['original']:,} training rows, {counts['swapped']:,} swapped, {counts['framed']:,} framed, "
        f"{counts['unsure']:,} swaps left out; to train on it: {given} --config.data.columns= --config.data.prepare="
    ]


def _flags(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What experts flagged, where there is a database; writes the preferences that follow from it."""
    if not config.review.database:
        return {}
    try:
        from jaxtune.review import flagged, store
    except ImportError as error:
        raise UserError("review.database needs SQLAlchemy: pip install 'jaxtune[review]', or set it to ''") from error
    with store.opened(config.review.database) as engine:
        items, verdicts = store.read_items(engine), store.read_verdicts(engine)
    pairs, without = flagged.preferences(items, verdicts)
    if pairs and jax.process_index() == 0:
        write_lines(workdir / "flagged_pairs.jsonl", pairs)
    return {**flagged.gathered(items, verdicts), "pairs": len(pairs), "without_better_answer": without}


# ---- models ----


def model_config(config: ConfigDict, what: str) -> ConfigDict:
    """The config with the model that one of `audit.models` names.

    Raises:
      UserError: nothing there is a model or an adapter.
    """
    own = guests.none(config)
    if what in ("", "base"):
        own.tune.adapter = "" if what else own.tune.adapter
        return own
    path = fetch.local(what)
    place = next((one for one in (path / "adapter", path / "model", path) if _is_result(one)), path)
    if (place / "adapter_config.json").exists():
        own.tune.adapter = str(place)
        own.tune.method = own.tune.method if own.tune.method in ("lora", "prompt") else "lora"
    elif _is_result(place):
        own.model.source, own.model.tokenizer, own.model.head, own.model.labels, own.tune.adapter = (
            str(place),
            "",
            "",
            (),
            "",
        )
    else:
        raise UserError(
            f"audit.models has {what!r}, in which there is neither a model nor an adapter; expected a run's workdir with adapter/ or model/, or a "
            "folder of one of these"
        )
    return own


def _is_result(path: Path) -> bool:
    weights = path.is_dir() and any(path.glob("*.safetensors"))
    return path.suffix == ".gguf" or (
        weights and any((path / name).exists() for name in ("adapter_config.json", "config.json"))
    )


def _answers(config: ConfigDict, workdir: Path, name: str, asked: Asked) -> dict[str, Any]:
    """What a model answers to all that is asked: as it is kept, or measured and then kept."""
    model = source.find(config)
    file, key = workdir / "models" / f"{name}.json", _key(config, model, asked)
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if kept.get("asked") == key:
            return kept
    found = {"asked": key, **_measured(config, model, name, asked)}
    if jax.process_index() == 0:
        write_whole(file, json.dumps(found, ensure_ascii=False) + "\n")
    return found


def _measured(config: ConfigDict, model: Model, name: str, asked: Asked) -> dict[str, Any]:
    tokenizer = source.find_tokenizer(config, model)
    auto = reading.auto_class(model.hf_config)
    masked = auto == "AutoModelForMaskedLM"
    if asked.questions and auto != "AutoModelForCausalLM":
        raise UserError(
            f"{model.uri} writes no text, and BBQ is answered by the likelihood of answers: set audit.bbq=''"
        )
    if asked.pairs and not masked and auto != "AutoModelForCausalLM":
        raise UserError(
            f"{model.uri} gives sentences no likelihood (architectures={model.hf_config.get('architectures')}): set audit.crows=''"
        )
    reader = start.reader(config, model, tokenizer)
    held = counterfactual.held(config, asked.probes, asked.labels, tokenizer, reader) if asked.probes else None
    label = counterfactual.check_label(config.audit.score_label, held.labels) if held else ""
    program, values = start.program(config, model)
    if held:
        measure.check(config, held, tokenizer, program)
    _check_lengths(config, program, tokenizer, asked)
    show = _show(config)
    sweep.say(config, f"auditing {name}")
    state, frozen = start.load(config, model, program, values, show)
    params = {**frozen, **state.params}
    found: dict[str, Any] = {
        "model": f"{model.uri}{f' with {config.tune.adapter}' if config.tune.adapter else ''}",
        "how": {},
    }
    if held:
        result = measure.measure(config, held, tokenizer, program, params, show, name)
        found["probes"] = [list(answer) for answer in counterfactual.answers(result, label)]
        found["how"]["probes"] = _how(held.metric, label)
    if asked.questions:
        found["bbq"] = bias.ask(asked.questions, config, tokenizer, program, params, show, name)
        found["how"]["bbq"] = "the likeliest of three answers" + (", per token" if config.audit.bbq_per_token else "")
    if asked.pairs:
        found["crows"] = bias.compare(
            asked.pairs, masked, config.eval.batch_size, tokenizer, program, params, show, name
        )
        found["how"]["crows"] = (
            "pseudo-log-likelihood of shared tokens" if masked else "log-likelihood of the whole sentence"
        )
    return found


def _how(metric: str, label: str) -> str:
    scores = {
        "number": "the number that the model gives",
        "perplexity": "log-likelihood of a token of the answer",
        "exact_match": "generated answers",
    }
    return scores.get(metric, f"the likeliest label; score is the probability of {label!r}")


def _check_lengths(config: ConfigDict, program: Program, tokenizer: Tokenizer, asked: Asked) -> None:
    most, longest = program.model_config.max_positions, [0]
    if asked.questions:
        prompts, answers = bias.prompted(asked.questions, config, tokenizer)
        longest += [len(prompt) + max(map(len, each)) for prompt, each in zip(prompts, answers, strict=True)]
    longest += [len(tokenizer.encode(text)) + 2 for one in asked.pairs or () for text in (one.more, one.less)]
    if max(longest) > most:
        raise UserError(
            f"a row of BBQ or CrowS-Pairs has {max(longest)} tokens, and the model {most} positions: leave that part out"
        )


def _key(config: ConfigDict, model: Model, asked: Asked) -> str:
    """A hash of all that a model's answers depend on: its files, what is asked, and how."""
    place = [path for path in (model.path, model.adapter) if path is not None]
    files = [one for path in place for one in ([path] if path.is_file() else sorted(path.glob("*"))) if one.is_file()]
    sizes = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    sections = {name: config[name].to_dict() for name in ("model", "tune", "data", "generate")}
    options = {key: config.audit[key] for key in ("score_label", "bbq_prompt", "bbq_per_token")}
    told = [sizes, model.hf_config, sections, options, config.eval.metric, config.train.objective, asked[:4]]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


# ---- what is told ----


def _figures(asked: Asked, answers: Mapping[str, Any]) -> list[Figure]:
    made: list[Figure] = []
    if asked.probes:
        made += counterfactual.figures(
            asked.probes.compared, [counterfactual.Answer(*one) for one in answers["probes"]]
        )
    if asked.questions:
        made += bias.bbq_figures(answers["bbq"])
    return made + (bias.crows_figures(answers["crows"]) if asked.pairs else [])


def _write(
    config: ConfigDict, workdir: Path, asked: Asked, measured: Mapping[str, list[Figure]], more: dict[str, Any]
) -> None:
    if jax.process_index():
        return
    options, flags = measure.intervals(config), more["flags"]
    told = bias_account.found(measured, options) if measured else {"figures": {}, "differences": {}}
    models = {name: own.tune.adapter or own.model.source for name, own in more.pop("models").items()}
    notices = list(asked.notices)
    if flags:
        notices.append(
            f"Experts flagged {len({one['item'] for one in flags['flagged']}):,} items; {flags['pairs']:,} preferences follow from those flagged as bias, "
            f"{flags['without_better_answer']:,} of them have no better answer yet."
        )
    told |= {**more, "about": models, "notices": notices}
    kept = {key: value for key, value in told.items() if key != "about"} | {
        "models": models,
        "config": privacy.without_names(json.loads(config_lib.to_json(config))),
    }
    write_whole(workdir / "audit.json", json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    bias_account.write(config, workdir, told)
    bias_account.say(config, told)
    for one in flags.get("groups", ()):
        print(
            f"flagged {one['type']}, {one['group'] or 'no group'}: {one['flags']} flags on {one['items']} items by {one['people']} people"
        )
    print(f"report in {workdir / 'report.html'}, all figures in {workdir / 'audit.json'}")


def _show(config: ConfigDict) -> Any:
    return partial(tracking.progress, mode=config.tracking.progress)
