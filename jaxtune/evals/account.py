"""A run's account to its reader: report.html and report.json, and the before/after table in the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import re
import resource
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxtune
from jaxtune import model_card, report, tracking
from jaxtune.config import ConfigDict
from jaxtune.data import bm25, pipeline, preferences, privacy, sources
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure, tasks
from jaxtune.evals.retention import Retention
from jaxtune.models import reading
from jaxtune.train import goodput, loop
from jaxtune.train import rows as rows_lib
from jaxtune.train import state as state_lib
from jaxtune.train.goodput import Wall
from jaxtune.train.state import Program
from jaxtune.validation_retention import objectives
from jaxtune.weights import source
from jaxtune.workdir import shown


def table(config: ConfigDict, results: dict[str, tasks.Result]) -> str:
    """Metrics of one or more models side by side, with their intervals."""
    names = list(results)
    width = 2 + max(map(len, results[names[0]].metrics))
    lines = [" " * width + "".join(f"{name[:28]:>30}" for name in names)]
    for metric in results[names[0]].metrics:
        cells = [results[name].metrics[metric] for name in names]
        lines.append(
            f"{metric:<{width}}" + "".join(f"{f'{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]':>30}" for e in cells)
        )
    return "\n".join(lines) + f"\n({config.eval.confidence:.0%} bootstrap intervals)"


class Run(NamedTuple):
    """All that an account is made from.

    `data_counts` are rows and tokens by kind; `wall` the process's stopwatch; `folder` holds the result, where there is one; `beside` is what others make of the same rows; `cost` what the base
    model has paid.
    """

    model: source.Model
    tokenizer: Tokenizer
    program: Program
    splits: pipeline.Splits
    data_counts: dict[str, int]
    held: measure.HeldOut | None
    outcome: loop.Outcome
    before: tasks.Result | None
    after: tasks.Result | None
    wall: Wall
    folder: Path | None
    beside: dict[str, tasks.Result]
    cost: Retention


def write(config: ConfigDict, workdir: Path, run: Run) -> None:
    """Writes report.html and report.json into `workdir`, and prints the before/after table."""
    before, after = run.before, run.after
    place = shown(config.workdir, workdir, run.folder) if run.folder else ""
    difference = tasks.compare(before, after, **measure.intervals(config)) if before and after else {}
    against = {
        name: tasks.compare(other, after, **measure.intervals(config)) for name, other in run.beside.items() if after
    }
    unmeasured = [] if run.held else [f"There are {measure.nothing_held(config)}."]
    facts = {
        "name": config.name,
        "about": _about(config, run),
        "alerts": run.cost.alerts,
        "notices": run.outcome.progress.notices
        + run.cost.notices
        + _data_notices(Counter(run.splits.counts) + Counter(run.data_counts))
        + _round_notices(workdir / "metrics.jsonl")
        + _searched(run.held)
        + unmeasured,
        "metric": "macro_f1" if after and "macro_f1" in after.metrics else None,  # else the first
        "before": before.metrics if before else {},
        "after": after.metrics if after else {},
        "difference": difference,
        "beside": {name: {"metrics": run.beside[name].metrics, "difference": gap} for name, gap in against.items()},
        "confusion": _confusion(before, after),
        "train": _training(run),
        "data": _data(run),
        **_time(run),
        "how_to": _how_to(config, run.model, place) if place else [],
        **run.cost.facts(),
        **_privacy(config, run.splits),
        **_origin(config, run.model),
        "config": privacy.without_names(config.to_dict()),
        "examples": _examples(run.held, before, after, run.tokenizer),
    }
    known = {name: fact for name, fact in facts.items() if fact is not None}
    if config.tracking.report:
        with tracking.writing(workdir / "report.html"):
            report.write(workdir, known)
    if run.folder and config.card.enabled:
        model_card.write(run.folder, known)
    if after:
        print(table(config, ({"before": before} if before else {}) | {"after": after} | run.beside))
    for against_what, gaps in {
        "": difference,
        **{f", after against {other}": gaps for other, gaps in against.items()},
    }.items():
        for name, gap in gaps.items():
            change = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], p = {gap['p']:.2g} ({gap['test']})"
            print(f"{name}{against_what}: {change}")
    where = f", report in {shown(config.workdir, workdir, workdir / 'report.html')}" if config.tracking.report else ""
    for line in run.cost.lines():
        print(line)
    print(f"result in {place}{where}" if place else f"no result{where}")


def card(config: ConfigDict, workdir: Path, folder: Path) -> None:
    """Writes the model card of what `export` wrote into `folder`, from the report of the run; without one there is nothing to tell."""
    file = workdir / "report.json"
    if not file.exists():
        return
    facts = json.loads(file.read_text("utf-8"))
    is_adapter = (folder / "adapter_config.json").exists()
    facts["config"] = {**config.to_dict()} | {"privacy": privacy.without_names(config.to_dict())["privacy"]}
    facts.setdefault("model", {})["library"] = "peft" if is_adapter else "transformers"
    model_card.write(folder, facts)


def compare_runs(config: ConfigDict, first: tuple[Path, str], second: tuple[Path, str]) -> dict[str, dict[str, Any]]:
    """Two models that were judged on the same rows: second minus first, as `tasks.compare`; of each a run's
    predictions.jsonl and the side in it.
    """
    options = measure.intervals(config)
    sides = [tasks.read_predictions(path, side) for path, side in (first, second)]
    known = {"passed": "pass_rate", "reward": "mean_reward", "correct": "exact_match"}
    names = [name for column, name in known.items() if all(column in rows[0] for rows in sides)]
    return tasks.compare(*(tasks.measured(names, rows, (), **options) for rows in sides), **options)


def _about(config: ConfigDict, run: Run) -> dict[str, str]:
    lora, trained = run.program.lora, state_lib.num_params(run.program.state.params)
    how = f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}" if lora else f"{config.tune.method} fine-tuning"
    how = f"soft prompt, {run.program.prompt.num_tokens} virtual tokens" if run.program.prompt else how
    hardware = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    method = f"{how}: {trained:,} trained parameters"
    return {"Model": run.model.uri, "Method": method, **_learnt(config), "Hardware": hardware}


def _learnt(config: ConfigDict) -> dict[str, str]:
    """What the loss is a sum of: objectives ("dpo + 0.5 x sft"), who teaches, and what holds the run near its start."""
    beside, distill = [f"{share:g} x {name}" for name, share, *_ in config.train.beside], config.distill
    told = {"Objective": " + ".join([config.train.objective, *beside])}
    if "distill" in objectives(config):
        own = f" with {distill.teacher_adapter}" if distill.teacher_adapter else ""
        told["Teacher"] = f"{distill.teacher}{own}, {distill.mode}"
    if config.retain.penalties:
        told["Penalties"] = " + ".join(f"{weight:g} x {name}" for name, weight in config.retain.penalties)
    return told


def _training(run: Run) -> dict[str, Any]:
    told = run.outcome.progress
    return {
        "steps": run.outcome.steps,
        "trained_tokens": told.trained_tokens,
        "tokens_per_second": round(run.outcome.tokens_per_second, 1),
        "seconds": round(run.outcome.seconds["first_step"] + run.outcome.seconds["training"], 2),
        "peak_memory_bytes": _peak_memory_bytes(),
        "mfu": run.outcome.mfu,
        "best_step": told.best_step,
        "best_validation_loss": told.best_loss,
    }


_PARTS = ("fetch", "tokenise", "load", "evaluation", "export")  # of a run; the loop counts the others


def _time(run: Run) -> dict[str, Any]:
    """`seconds` by part of the run, what it was resumed from included; `start` and `wall` of this process."""
    account, started = run.wall.account(), run.wall.started
    parts = {part: account[part] for part in _PARTS if part in account} | run.outcome.seconds
    times = {"seconds": {part: round(took, 2) for part, took in parts.items()}}
    if started is None:
        return times
    start = {
        "seconds": {part: round(took, 3) for part, took in started.seconds.items()},
        "compile_seconds": round(started.compile_seconds, 3),
        "compile_overlapped_seconds": round(goodput.overlapped_seconds(started), 3),
        "from_cache": started.from_cache,
    }
    return times | {"start": start, "wall": {cause: round(took, 3) for cause, took in account.items()}}


def _data(run: Run) -> dict[str, Any]:
    counts = run.data_counts
    lost = Counter(run.splits.counts) + Counter(counts)
    return {
        **{name: counts[name] for name in ("rows", "tokens", "trained_tokens", "truncated")},
        "validation_rows": len(run.splits.validation),
        "measured_rows": len(run.after.rows) if run.after else 0,
        "padding_share": run.outcome.padding_share,
        **{name: number for name, number in counts.items() if name.startswith(rows_lib.REPLAY)},
        "dropped": {
            name.replace("_", " "): n
            for name, n in lost.items()
            if n and name not in _NOT_DROPPED and not name.startswith(rows_lib.REPLAY)
        },
    }


def _origin(config: ConfigDict, model: source.Model) -> dict[str, Any]:
    """What the result was made from: files with their hashes, the base and its licence where that is known, and by which versions."""
    files = [
        {"split": split, "uri": config.data[split], "sha256": sources.sha256(path, config.data.files)}
        for split, path in rows_lib.paths(config).items()
    ]
    auto, named = (
        reading.auto_class(model.hf_config, config.train.objective),
        str(model.hf_config.get("_name_or_path", "")),
    )
    is_adapter = config.tune.method in ("lora", "prompt") and not config.export.merge
    whole = "sentence-transformers" if config.train.objective == "contrastive" else "transformers"
    hub = (
        model_card.dataset(model.uri)
        if model.uri.startswith("hf:")
        else named
        if re.fullmatch(r"[\w.-]+/[\w.-]+", named)
        else ""
    )
    told = {"base": hub or model.uri, "auto_class": auto, "library": "peft" if is_adapter else whole}
    readme = model.path / "README.md" if model.path and model.path.is_dir() else None
    if readme and readme.exists():
        told["license"] = str(model_card.split(readme.read_text("utf-8", "replace"))[0].get("license", ""))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "transformers")}
    return {"files": files, "model": told, "versions": {"jaxtune": jaxtune.__version__, **versions}}


def _privacy(config: ConfigDict, splits: pipeline.Splits) -> dict[str, Any]:
    """The personal data that was found in the rows, in numbers and as a table of the page."""
    if not config.privacy.enabled:
        return {}
    found = rows_lib.personal(splits)
    header = ["Kind", "What became of it", *(f"In {split} rows" for split in found["by_split"])]
    told = [
        [kind, how, *(f"{one['found'].get(kind, {}).get(how, 0):,}" for one in found["by_split"].values())]
        for kind, hows in found["found"].items()
        for how in hows
    ]
    if not told:
        return {"privacy": found}
    title = f"Personal data in {found['rows']:,} rows"
    return {"privacy": found, "tables": [{"title": title, "header": header, "rows": told, "plots": []}]}


_NOT_DROPPED = (
    "train", "validation", "test", "rows", "tokens", "trained_tokens", "truncated", "without_trained_stop",
    "tools_not_in_template", "passages", "prompt_over_window",
)  # fmt: skip


def _round_notices(path: Path) -> list[str]:
    """What rounds of rollouts left unlearned, of a whole run."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
    errors = Counter[str]()
    for line in lines:
        errors.update({key[14:]: num for key, num in line.items() if key.startswith("reward_errors/") and num})
    empty, steps = sum(line.get("nothing_to_learn", 0) for line in lines), sum("loss" in line for line in lines)
    dropped = sum(line.get("dropped_completions", 0) for line in lines)
    notices = [f"Reward {kind} {num:,} times." for kind, num in errors.items()]
    if anew := sum(line.get("written_anew", 0) for line in lines):
        notices.append(
            f"{anew:,} rounds were written anew in their midst, for WORKDIR/rollouts lacked them: resuming was not exact."
        )
    if dropped:
        notices.append(f"{dropped:,} completions had no reward and were not learned from.")
    if empty:
        notices.append(
            f"{empty:,} of {steps:,} steps changed nothing: no completion of their batch was better than another. Other prompts, larger "
            "groups (rl.group_size), a higher rl.temperature or a reward with more steps to it would help."
        )
    return notices


def _data_notices(counts: dict[str, int]) -> list[str]:
    notices = []
    if counts["truncated"]:
        most = "data.max_length or data.max_passage_length" if "passages" in counts else "data.max_length"
        notices.append(f"{counts['truncated']:,} rows were longer than {most} and cut.")
    notices += [f"{counts[name]:,} rows: {told}." for name, told in preferences.DROPPED.items() if counts.get(name)]
    if counts["without_trained_stop"]:
        notices.append(
            f"{counts['without_trained_stop']:,} of {counts['rows']:,} rows never train a token that ends an answer: a model "
            f"may not learn from them to stop."
        )
    if counts["tools_not_in_template"]:
        notices.append(
            f"{counts['tools_not_in_template']:,} rows have tools or tool calls that the chat template does not print: the model "
            f"never sees them. Set model.chat_template to a template that prints them."
        )
    return notices


def _searched(held: measure.HeldOut | None) -> list[str]:
    """What there is to say about a search."""
    if held is None or held.corpus is None:
        return []
    corpus = held.corpus
    notices = [f"{len(held.rows):,} queries over a corpus of {len(corpus.ids):,} passages."]
    if corpus.num_cut:
        notices.append(
            f"{corpus.num_cut:,} of its passages were longer than data.max_passage_length and cut for the model."
        )
    if not bm25.is_installed():
        notices.append("BM25 was not measured beside: pip install 'jaxtune[retrieval]' adds it.")
    return notices


def _confusion(before: tasks.Result | None, after: tasks.Result | None) -> dict[str, Any] | None:
    if after is None or after.confusion is None:
        return None
    sides = {"after": after.confusion.tolist()}
    if before is not None and before.confusion is not None:
        sides = {"before": before.confusion.tolist(), **sides}
    return {"labels": list(after.labels), **sides}


def _peak_memory_bytes() -> int:
    """The device's peak where it reports one, else this process's."""
    stats = jax.local_devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _examples(
    held: measure.HeldOut | None, before: tasks.Result | None, after: tasks.Result | None, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """A few held-out rows with both answers, changed ones first."""
    if not held or not held.rows or not before or not after:
        return []
    told = dict(zip(held.corpus.ids, held.corpus.texts, strict=True)) if held.corpus else {}
    trios = list(zip(held.rows, before.rows, after.rows, strict=True))
    trios.sort(key=lambda trio: trio[1]["prediction"] == trio[2]["prediction"])
    return [
        {
            "prompt": tokenizer.decode(row["prompt_ids"]),
            "answer": _words(told.get(row["answer"]) if told else row["answer"]),
            "before": _words(told.get(b["prediction"]) if told else b["prediction"]),
            "after": _words(told.get(a["prediction"]) if told else a["prediction"]),
        }
        for row, b, a in trios[:6]
    ]


def _words(value: Any) -> str:
    """An answer for the page: a label, several, a number, or tags, of which a word without one has a dash."""
    if isinstance(value, list):
        return " ".join("–" if one is None else str(one) for one in value) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _how_to(config: ConfigDict, model: source.Model, folder: str) -> list[tuple[str, str]]:
    base = (
        f'"{model.path.parent}", gguf_file="{model.path.name}"'
        if model.path and model.path.is_file()
        else f'"{model.path or model.uri}"'
    )
    auto = reading.auto_class(model.hf_config, config.train.objective)
    labels = f", num_labels={len(source.labels(model))}" if auto.endswith("Classification") else ""
    fetched, load = [], f"from transformers import {auto}\n"
    if "://" in folder:
        fetched = [("To this machine", f"gcloud storage cp -r {folder} .")]
        folder = folder.rsplit("/", 1)[-1]
    if config.tune.method in ("lora", "prompt") and not config.export.merge:
        load = f"from peft import PeftModel\n{load}base = {auto}.from_pretrained({base}{labels})\n"
        load += f'model = PeftModel.from_pretrained(base, "{folder}")'
    else:
        load += f'model = {auto}.from_pretrained("{folder}")'
    verb = "chat" if auto.endswith("CausalLM") else "evaluate"
    again = (
        f"python -m jaxtune.launch {verb} --config={config.workdir.rstrip('/')}/config.json --workdir={config.workdir}"
    )
    merge = again.replace(f" {verb} ", " export ") + " --config.export.merge=True"
    if config.train.objective == "contrastive":
        search = f'from sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer("{folder}")'
        fetched = [*fetched, ("As an embedding model", search)]
    return [*fetched, ("In PyTorch", load), ("In the terminal", again), ("As one merged model folder", merge)]
