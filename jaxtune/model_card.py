"""The model card: README.md of an exported adapter or model as Hugging Face reads it, written from what the run measured.

What loads the weights is taken over from the README that the export wrote; all else is made anew, so that a card may be written again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxtune import report
from jaxtune.types import UserError
from jaxtune.workdir import write_whole

_LOADING, _END = "<!-- how to load -->", "<!-- end of how to load -->"
_TASKS = {  # transformers' class -> Hugging Face's name of the task
    "AutoModelForCausalLM": "text-generation", "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification", "AutoModelForMaskedLM": "fill-mask", "AutoModel": "feature-extraction",
}  # fmt: skip


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `folder/README.md`.

    Args:
      folder: an exported adapter or model; a README that is there gives what it says in YAML and how to load the weights.
      facts: those of `report.write`, and of them `config` always; `files`: [{split, uri, sha256}]; `model`: {base, license, auto_class, library}.

    Raises:
      UserError: `card.audit` or `card.guidance` names what is not there or is something else; or the disk is full.
    """
    told = report.in_words(facts)
    plain: dict[str, Any] = told["plain"]
    card = plain["config"]["card"]
    readme = folder / "README.md"
    front, loading = split(readme.read_text("utf-8")) if readme.exists() else ({}, "")
    front = front_matter(plain, front)
    parts = [
        f"# {_line(plain['name'])}",
        told["headline"],
        _list({**plain.get("about", {}), "Made with": _versions(plain)}),
        "## Intended use",
        card["intended_use"] or "Not stated.",
        "## Limitations",
        card["limitations"] or "Not stated.",
        "## Results",
        *_results(told, plain),
        "## What it forgot",
        *_forgotten(told, plain),
        "## Training data",
        *_data(plain),
        "## Personal data",
        *_private(plain),
        "## Bias",
        *_bias(card["audit"]),
        "## Human guidance",
        *_guided(card["guidance"]),
        "## Training",
        _list(dict(told["training"]) | _settings(plain["config"])),
        "## How to load",
        f"{_LOADING}\n{loading or _how_to(plain)}\n{_END}",
    ]
    yaml_text = yaml.safe_dump(front, allow_unicode=True, sort_keys=False, width=1000)
    write_whole(readme, f"---\n{yaml_text}---\n" + "\n\n".join(part for part in parts if part) + "\n")


def split(text: str) -> tuple[dict[str, Any], str]:
    """Returns what a README says in YAML, and how to load: all of its text, or the part that an earlier card has marked."""
    front: Any = {}
    found = re.match(r"---\n(.*?)\n---\n?", text, re.DOTALL)
    if found:
        text = text[found.end() :]
        try:
            front = yaml.safe_load(found[1])
        except yaml.YAMLError:  # whoever wrote it
            front = {}
    if _LOADING in text:
        text = text.partition(_LOADING)[2].partition(_END)[0]
    else:
        parts = text.split("```")  # code between them, in which # is something else
        text = "```".join(part if at % 2 else re.sub(r"(?m)^#(?=#* )", "###", part) for at, part in enumerate(parts))
    return front if isinstance(front, dict) else {}, text.strip()


def front_matter(facts: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the YAML: Hugging Face's fields, those that are known."""
    config, model = facts["config"], facts.get("model", {})
    card, task = config["card"], _TASKS.get(model.get("auto_class", ""), "")
    is_adapter = model.get("library", earlier.get("library_name")) == "peft"
    made = {
        "library_name": model.get("library") or earlier.get("library_name", "transformers"),
        "base_model": card["base_model"] or model.get("base") or earlier.get("base_model", ""),
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "license": card["license"] or model.get("license", ""),
        "language": list(card["language"]),
        "pipeline_tag": task,
        "tags": list(dict.fromkeys([*_several(earlier.get("tags")), "jaxtune", config["train"]["objective"]])),
        "datasets": list(dict.fromkeys(dataset(one["uri"]) for one in facts.get("files", []))),
        "metrics": list(facts.get("after", {})),
        "model-index": _index(facts, task or "text-generation"),
    }
    return {name: value for name, value in made.items() if value}


def _several(tags: Any) -> list[Any]:
    return list(tags) if isinstance(tags, list) else [tags] if tags else []


def check(card: Mapping[str, Any]) -> None:
    """Refuses, before anything is trained, a file that the card could not be written from; a folder may be filled yet.

    Raises:
      UserError: with what was expected.
    """
    for key, name, told in (("audit", "audit.json", _bias), ("guidance", "report.json", _guided)):
        path = Path(card[key]).expanduser() if card[key] else None
        if path and (path.is_file() or (path / name).is_file()):
            told(card[key])


def dataset(uri: str) -> str:
    """Returns the name of a data set: of the hub's its own, of a file on this machine no more than the file's."""
    scheme, _, place = uri.partition(":")
    if scheme == "hf":
        return place.split("#")[0].split("@")[0].removeprefix("datasets/")
    return uri if is_elsewhere(uri) else Path(uri).name


def is_elsewhere(uri: str) -> bool:
    """Whether it is no path of this machine, which is nobody else's to know."""
    return re.match(r"\w{2,}:", uri) is not None


def _index(facts: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    after = facts.get("after", {})
    if not after:
        return []
    files = {one["split"]: one for one in facts.get("files", [])}
    which = facts["config"]["eval"]["split"]
    file = files.get({"validation": "eval"}.get(which, which)) or files.get("train") or {"uri": "unknown"}
    name = dataset(file["uri"])
    confidence = f"{100 * facts['config']['eval']['confidence']:g}%"
    metrics = [
        {
            "type": metric,
            "value": e["value"],
            "name": f"{metric} ({confidence} interval {e['low']:.4g} to {e['high']:.4g})",
        }
        for metric, e in after.items()
        if None not in (e["value"], e["low"], e["high"])
    ]
    result = {"task": {"type": task}, "dataset": {"type": name, "name": name, "split": which}, "metrics": metrics}
    return [{"name": str(facts["name"]), "results": [result]}]


# ---- sections ----


def _results(told: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    if not told["results"]:
        return ["Not measured."]
    held, split = plain.get("data", {}).get("measured_rows"), plain["config"]["eval"]["split"]
    rows = [_compared(row) for row in told["results"]]
    note = f"On {held:,} rows of the {split} split; {told['confidence']}bootstrap intervals." if held else ""
    return [note, _table(["Metric", "Before", "After", "Difference", ""], rows)]


def _compared(row: Mapping[str, Any]) -> list[str]:
    sides = [f"{side[0]} ({side[1]})" if side else "" for side in (row["before"], row["after"], row["difference"])]
    return [row["name"], *sides, f"{row['p']}, {row['test']}" if row.get("p") else ""]


def _forgotten(told: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    kl = plain.get("base_kl")
    lines = [f"KL divergence from the base: {kl:.3g} nats per token."] if kl is not None else []
    if not told["protected"]:
        return [*lines, "No protected set was measured: what this model has forgotten is not known."]
    header = ["Set", "Metric", "Before", "After", "Difference", "Worse by at most", "Within it"]
    rows = [
        [
            row["name"],
            *_compared({**row, "name": row["metric"]})[:4],
            row["tolerance"],
            "no" if row["broken"] else "yes",
        ]
        for row in told["protected"]
    ]
    return [*lines, _table(header, rows)]


def _data(plain: Mapping[str, Any]) -> list[str]:
    files = plain.get("files", [])
    rows = [
        [one["split"], one["uri"] if is_elsewhere(one["uri"]) else dataset(one["uri"]), one["sha256"]] for one in files
    ]
    data = plain.get("data", {})
    counts = {name.replace("_", " ").capitalize(): f"{n:,}" for name, n in data.items() if isinstance(n, int)}
    counts |= {f"Dropped, {reason}": f"{n:,}" for reason, n in data.get("dropped", {}).items()}
    return [_table(["File for", "Data", "SHA-256"], rows) if rows else "", _list(counts)]


def _private(plain: Mapping[str, Any]) -> list[str]:
    found = plain.get("privacy")
    if found is None:
        return ["Personal data were not looked for in the training data."]
    if not found["found"]:
        return ["Personal data were looked for in the data by pattern, checksum and lists, and none were found."]
    rows = [[kind, how, f"{n:,}"] for kind, hows in found["found"].items() for how, n in hows.items()]
    note = (
        f"Looked for by pattern, checksum and lists before anything was trained or measured; found in {found['rows']:,} rows. "
        "What has no pattern and is on no list was not found."
    )
    return [note, _table(["Kind", "What became of it", "Found"], rows)]


def _bias(place: str) -> list[str]:
    if not place:
        return ["Not audited."]
    found = _read(place, "audit.json", "card.audit", "figures")
    figures: dict[str, list[dict[str, Any]]] = found["figures"]
    header = ["Of", "Figure", "Model", "Value", "Rows"]
    rows = [
        [f"{one['part']}: {one['name']}", one["metric"], model, _estimate(one), f"{one['rows']:,}"]
        for model, each in figures.items()
        for one in each
    ]
    changed = [
        [f"{one['part']}: {one['name']}", one["metric"], what, _estimate(one), f"{one['p']:.2g}"]
        for what, each in found.get("differences", {}).items()
        for one in each
    ]
    between = (
        ["Differences on the same rows:", _table(["Of", "Figure", "Between", "Value", "p"], changed)] if changed else []
    )
    return [_table(header, rows), *between, *(f"- {_line(note)}" for note in found.get("notices", []))]


def _guided(place: str) -> list[str]:
    if not place:
        return ["No verdict of a person is behind this model, beyond its training data."]
    found = _read(place, "report.json", "card.guidance", "")
    line, figures, compared = (found.get(name) or {} for name in ("ledger", "figures", "comparison"))
    if not line and not figures:
        raise UserError(
            f"card.guidance={place!r} has neither a round's ledger line nor figures of experts; expected a round's folder of `guide`, or the "
            "report of `review`"
        )
    told: dict[str, Any] = {"Round": line.get("round", figures.get("round", ""))}
    if line:
        verdicts = line["verdicts"]
        told |= {"Verdicts": f"{verdicts['verdicts']:,}", "People": f"{verdicts['people']:,}"}
        told |= {f"Items of {task}": f"{n:,}" for task, n in line["items"].items()}
        told |= {f"Rows of {name.removesuffix('.jsonl')}": f"{file['rows']:,}" for name, file in line["data"].items()}
    if compared:
        told["Blind comparison with the model before"] = (
            f"{compared['wins']} won, {compared['ties']} tied, {compared['losses']} lost; win rate {_estimate(compared['rate'])}"
        )
    rows = [
        [
            task,
            of["kind"],
            f"{of['answers']:,}",
            of["agreement"].get("level", ""),
            _estimate(of["agreement"].get("alpha")),
        ]
        for task, of in figures.get("tasks", {}).items()
    ]
    table = _table(["Task", "Kind", "Answers", "Level", "Krippendorff's α"], rows) if rows else ""
    return [_list(told), table]


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    train, optim = config["train"], config["optim"]
    return {
        "Optimizer": f"{optim['name']}, learning rate {optim['learning_rate']:g}, {optim['schedule']}",
        "Batch": f"{train['batch_size']} rows of at most {config['data']['max_length']} tokens",
        "Seed": str(train["seed"]),
    }


def _how_to(plain: Mapping[str, Any]) -> str:
    found = dict(plain.get("how_to", []))
    return f"```python\n{found['In PyTorch']}\n```" if "In PyTorch" in found else ""


def _versions(plain: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in plain.get("versions", {}).items())


# ---- words ----


def _read(place: str, name: str, key: str, needs: str) -> dict[str, Any]:
    path = Path(place).expanduser()
    path = path / name if path.is_dir() else path
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={place!r}: {path} cannot be read ({error}); expected {name}, or a folder with one"
        ) from None
    if not isinstance(found, dict) or (needs and needs not in found):
        raise UserError(f"{key}={place!r}: {path} has no {needs!r}; expected {name}, or a folder with one")
    return found


def _estimate(e: Mapping[str, Any] | None) -> str:
    if not e or e.get("value") is None:
        return ""
    interval = f" ({e['low']:.3g} to {e['high']:.3g})" if None not in (e.get("low"), e.get("high")) else ""
    return f"{e['value']:.3g}{interval}"


def _line(value: Any) -> str:
    """One line in which no character means anything to Markdown's tables or to HTML."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([_line(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(told: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_line(name)}: {_line(value)}" for name, value in told.items() if value not in ("", None))
