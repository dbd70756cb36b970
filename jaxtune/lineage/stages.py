"""The stages of a lineage: one for each release, with the config and the data that it was trained by, as the ledger has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.data import pipeline, sources
from jaxtune.data.formats import Example
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import measure
from jaxtune.lineage.ledger import Line
from jaxtune.train import rows as rows_lib
from jaxtune.types import UserError
from jaxtune.validation_methods import ON_POLICY
from jaxtune.weights import source
from jaxtune.weights.source import Model

Files = dict[str, dict[str, Any]]  # split -> uri, sha256, rows
_SPLITS = {"train": "train", "eval": "validation", "test": "test"}


class Stage(NamedTuple):
    """What one release learned: its number, its name among the stages, its config, and its rows.

    `digest` is a hash of its rows' files and of how they are read.
    """

    release: int
    name: str
    config: ConfigDict
    splits: pipeline.Splits
    files: Files
    digest: str

    @property
    def held(self) -> list[Example]:
        """The rows held out to measure on."""
        rows: list[Example] = getattr(self.splits, self.config.eval.split)
        return rows


def read(config: ConfigDict, release: int, name: str, tokenizer: Tokenizer, show: Any) -> Stage:
    """Fetches, hashes and reads a stage's rows.

    Raises:
      UserError: bad data, or none held out.
    """
    paths = rows_lib.paths(config)
    files: Files = {
        split: {"uri": config.data[split], "sha256": sources.sha256(path, config.data.files)}
        for split, path in paths.items()
    }
    splits = rows_lib.load(config, tokenizer, show, answers=config.train.objective not in ON_POLICY)
    of_train = sum(
        len(rows) for key, rows in zip(_SPLITS, splits[:3], strict=True) if key == "train" or key not in files
    )
    for split, one in files.items():
        one["rows"] = of_train if split == "train" else len(getattr(splits, _SPLITS[split]))
    stage = Stage(release, name, config, splits, files, _digest(config, files))
    if not stage.held:
        raise UserError(
            f"{name}: {measure.nothing_held(config)}: later releases could not be held to what this one learns"
        )
    return stage


_READ_BY = (
    "prefetch_batches",
    "packing",
    "shuffle",
    "max_length",
    "too_long",
    "train",
    "eval",
    "test",
)  # do not change rows


def _digest(config: ConfigDict, files: Files) -> str:
    by = {key: value for key, value in config.data.to_dict().items() if key not in _READ_BY}
    told = {"files": {split: one["sha256"] for split, one in files.items()}, "by": by}
    if (
        config.privacy.enabled
    ):  # which rows are read as; the key is no one's to know, and a new one changes every surrogate
        told["privacy"] = {key: value for key, value in config.privacy.to_dict().items() if not key.startswith("key_")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()


def named(name: str, release: int, earlier: Sequence[Stage]) -> str:
    """A release's name among the stages: its own, and its number where an earlier one has it."""
    return f"{name}.{release}" if name in [stage.name for stage in earlier] else name


def earlier(
    folder: Path, lines: Sequence[Line], on_changed_data: str, tokenizer: Tokenizer, show: Any
) -> tuple[list[Stage], list[str]]:
    """The stages of these releases, and what is to be told of data that are no longer what the ledger says.

    Raises:
      UserError: a config or a file is gone, or (unless `on_changed_data` is "note") has changed since.
    """
    found: list[Stage] = []
    notes = []
    for line in lines:
        path = folder / line["config"]["path"]
        if not path.exists() or sources.sha256(path, "") != line["config"]["sha256"]:
            raise UserError(
                f"{path}, by which release {line['release']} was made, is gone or was changed: put it back as it was"
            )
        name = named(line["name"], line["release"], found)
        try:
            stage = read(config_lib.from_json(path.read_text("utf-8")), line["release"], name, tokenizer, show)
        except UserError as error:
            raise UserError(f"the data of release {line['release']}, {line['name']!r}: {error}") from None
        for split, then in line["data"]["files"].items():
            now = stage.files.get(split, {}).get("sha256", "")
            if now == then["sha256"]:
                continue
            changed = (
                f"data.{split} of release {line['release']} ({line['name']!r}), {then['uri']}, has changed since: SHA-256 "
                f"{then['sha256'][:12]}… then, {now[:12]}… now"
            )
            if on_changed_data == "refuse":
                raise UserError(
                    f"{changed}; put it back, or set lineage.on_changed_data='note' to go on with what it holds now"
                )
            notes.append(changed)
        found.append(stage)
    return found, notes


def check_new(new: Stage, earlier: Sequence[Stage]) -> list[str]:
    """What is to be told of new data that earlier stages have seen.

    Raises:
      UserError: they are an earlier stage's, read as it did.
    """
    notes = []
    for stage in earlier:
        same = stage.files["train"]["sha256"] == new.files["train"]["sha256"]
        if stage.digest == new.digest:
            raise UserError(
                f"data.train={new.files['train']['uri']!r} is what release {stage.release} ({stage.name!r}) was trained on already (the "
                "same SHA-256, read alike): name new data, or go back first with lineage.rollback="
                f"{stage.release - 1}"
            )
        if same:
            notes.append(f"data.train is the file of release {stage.release} ({stage.name!r}), read in another way")
        held = {_key(example) for example in stage.held}
        shared = sum(_key(example) in held for example in new.splits.train)
        if shared:
            notes.append(
                f"{shared:,} training rows are among the {len(held):,} that {stage.name!r} holds out: its score is no longer of rows "
                "never seen"
            )
    return notes


def _key(example: Example) -> str:
    return json.dumps([example.messages, example.text, example.prompt, example.answer], sort_keys=True, default=str)


def replay(stages: Sequence[Stage], share: float) -> tuple[Any, ...]:
    """Entries of `retain.replay` for the training rows of these stages, which share `share` of each batch alike.

    Each is read as its stage read it, its held-out rows held out.
    """
    if not stages or not share:
        return ()
    plain = config_lib.base().data
    entries = []
    for stage in stages:
        data = stage.config.data
        keys = [key for key in data if key not in _READ_BY and data[key] != plain[key]]
        settings = [(f"data.{key}", data[key]) for key in keys]
        for split, key in (("eval", "validation_fraction"), ("test", "test_fraction")):
            # What replay would otherwise take as `base` has it, or not hold out at all.
            settings = [one for one in settings if one[0] != f"data.{key}"]
            settings.append((f"data.{key}", 0.0 if data[split] else data[key]))
        entries.append((data.train, share / len(stages), tuple(settings)))
    return tuple(entries)


def fingerprint(model: Model) -> str:
    """A hash that tells one base from another: its config, and the sizes of its files."""
    sizes = []
    if model.path is not None:
        files = [model.path] if model.path.is_file() else sorted(p for p in model.path.glob("*") if p.is_file())
        sizes = [(p.name, p.stat().st_size) for p in files if p.suffix in (".safetensors", ".gguf")]
    return hashlib.sha256(json.dumps([model.hf_config, sizes], sort_keys=True, default=str).encode()).hexdigest()


def check_base(folder: Path, base: Line, config: ConfigDict, model: Model) -> None:
    """Refuses a config that starts from another model than the lineage.

    Raises:
      UserError: with both.
    """
    if base["fingerprint"] != fingerprint(model):
        raise UserError(
            f"the lineage in {folder} is of {base['model']}, and model.source is {config.model.source!r}, another model: set it back, "
            "or begin another lineage"
        )
    if base["adapter"] != config.tune.adapter:
        raise UserError(
            f"the lineage in {folder} began with tune.adapter={base['adapter']!r}, and it is {config.tune.adapter!r} now; set it back: "
            "an update goes on from the released adapter by itself"
        )


def of_release(config: ConfigDict, folder: Path, line: Line) -> ConfigDict:
    """The config with a release's weights in the place of the base's.

    Raises:
      UserError: they are gone, or an adapter that this way of tuning cannot go on from.
    """
    made = config.copy_and_resolve_references()
    if line["kind"] == "base":
        return made
    weights = folder / line["weights"]
    if not weights.is_dir():
        raise UserError(
            f"the weights of release {line['release']} are gone: {weights}; put them back, or go back with lineage.rollback"
        )
    if not (weights / "adapter_config.json").exists():
        made.model.source, made.model.tokenizer, made.tune.adapter = str(weights), "", ""
    elif made.tune.method not in ("lora", "prompt"):
        raise UserError(
            f"release {line['release']} is an adapter, which tune.method={made.tune.method!r} cannot go on from: set it back to 'lora', "
            "or begin another lineage from a merged model (export.merge)"
        )
    else:
        made.tune.adapter = str(weights)
    return made


def tokenizer_of(config: ConfigDict) -> tuple[Model, Tokenizer]:
    """The base as the config names it, and its tokenizer; no weights are loaded."""
    model = source.find(config)
    return model, source.find_tokenizer(config, model)
