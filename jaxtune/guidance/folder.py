"""The folder of rounds: what is where, which model a round starts from, what may not change under it, and the ledger.

`ledger.jsonl` has a line for the first model, for each round that was trained, and for each comparison that was answered, chained
by hashes as a lineage's (`lineage/chain.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import checkpoint
from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.lineage import chain, stages
from jaxtune.lineage.chain import Line
from jaxtune.types import UserError
from jaxtune.weights.source import Model
from jaxtune.workdir import write_whole

LEDGER, _LOCK = "ledger.jsonl", ".guide.lock"
# Sections that decide what experts are asked: they stay as they were from the first item on.
_ASKED = ("model.", "tune.adapter", "tune.method", "data.", "review.tasks", "privacy.", "guide.", "eval.split")
# But for what may change while a round is under way.
_FREE = (
    "data.prefetch_batches", "data.packing", "data.shuffle", "data.max_length", "data.too_long", "model.attention", "guide.folder",
    "guide.enough", "guide.wait", "guide.poll_seconds", "guide.keep_flagged", "guide.start_from", "guide.edits", "guide.pairs_from_edits",
    "guide.repeat_agreed", "guide.trust", "guide.compare_", "guide.trace", "guide.show_names", "guide.slots",
)  # fmt: skip


class Round(NamedTuple):
    """A round: its number, its folder, the round whose result it starts from (0: the first model), and the ledger's lines."""

    number: int
    folder: Path
    parent: int
    lines: list[Line]

    @property
    def root(self) -> Path:
        return self.folder.parent

    def line(self, kind: str) -> Line | None:
        """The ledger's line of this kind about this round."""
        return next((one for one in self.lines if one["kind"] == kind and one.get("round") == self.number), None)


def root(config: ConfigDict, workdir: Path) -> Path:
    """Where the rounds are."""
    return Path(config.guide.folder).expanduser() if config.guide.folder else workdir


def database(config: ConfigDict, root: Path) -> str:
    """The review database's file or URL."""
    return str(config.review.database or root / "review.db")


@contextmanager
def opened(root: Path) -> Iterator[None]:
    """Holds the folder against another `guide`.

    Raises:
      UserError: another one is at work, or the folder is a file.
    """
    if root.is_file():
        raise UserError(
            f"guide.folder={str(root)!r} is a file; expected the folder of rounds, or a path where there is nothing"
        )
    root.mkdir(parents=True, exist_ok=True)
    busy = f"another guide of {root} is at work ({{who}}): wait for its end, or give this one another guide.folder"
    with chain.held(root / _LOCK, busy):
        yield


def read(config: ConfigDict, root: Path) -> Round:
    """The round that the config names.

    Raises:
      UserError: the ledger is broken, the round before is not trained, or the one to start from has no result to start from.
    """
    path, number, asked = root / LEDGER, config.guide.round, config.guide.start_from
    lines = chain.read(path) if path.exists() else []
    trained = {line["round"]: line for line in lines if line["kind"] == "round"}
    if number > 1 and number - 1 not in trained:
        listed = f"it has {', '.join(map(str, trained))}" if trained else "none is yet"
        raise UserError(
            f"guide.round={number} needs round {number - 1} of {root} to be trained, and {listed}: finish it first, with guide.round={number - 1}"
        )
    began = root / f"round_{number:02d}" / "began.json"
    usable = {0, *(n for n, line in trained.items() if n < number and line["starts_others"])}
    parent = max(usable) if asked < 0 else asked
    if began.exists() and asked < 0:
        parent = json.loads(began.read_text("utf-8"))["parent"]
    if parent not in usable:
        raise UserError(
            f"guide.start_from={asked}: round {asked} of {root} has no result that another could start from; expected one of "
            f"{', '.join(map(str, sorted(usable)))}"
        )
    return Round(number, root / f"round_{number:02d}", parent, lines)


def begin(config: ConfigDict, one: Round, model: Model, rows: str) -> Round:
    """Begins the round, or finds that it was begun by this config on these rows (`rows`: their hash).

    Raises:
      UserError: what decides what experts are asked has changed since, or the folder is of another model.
    """
    base = {
        "kind": "base", "model": config.model.source, "adapter": config.tune.adapter, "fingerprint": stages.fingerprint(model),
        "versions": chain.versions(),
    }  # fmt: skip
    first = one.lines[0] if one.lines else None
    if first is None:
        one = one._replace(lines=append(one, base))
    elif (first["fingerprint"], first["adapter"]) != (base["fingerprint"], base["adapter"]):
        raise UserError(
            f"the rounds in {one.root} are of {first['model']} {first['adapter']}, and model.source is {config.model.source!r} "
            f"(tune.adapter={config.tune.adapter!r}), another model: set it back, or give these rounds another guide.folder"
        )
    file = one.folder / "began.json"
    if not file.exists():
        told = {
            "round": one.number,
            "parent": one.parent,
            "rows": rows,
            "config": json.loads(config_lib.to_json(config)),
        }
        write_whole(one.folder / "config.json", config_lib.to_json(config) + "\n")
        write_whole(file, json.dumps(told, indent=2) + "\n")
        return one
    began = json.loads(file.read_text("utf-8"))
    if began["parent"] != one.parent:
        raise UserError(
            f"round {one.number} began from round {began['parent']}, and guide.start_from asks for {one.parent}: set it back"
        )
    others = tuple(key for key in config_lib.keys(config) if not key.startswith(_ASKED))
    check_same(began["config"], config, (*others, *_FREE), f"round {one.number} was begun")
    if began["rows"] != rows:
        raise UserError(
            f"the rows of data.train={config.data.train!r} (or data.test) have changed since round {one.number} began: put them back, "
            f"or begin the next round with them"
        )
    return one


def check_same(saved: dict[str, Any], config: ConfigDict, free: tuple[str, ...], since: str) -> None:
    """Refuses a config that differs from a saved one.

    Raises:
      UserError: with the first field that does.
    """
    changed = checkpoint.first_change(saved, config, free)
    if changed:
        key, then, now = changed
        raise UserError(
            f"{key} was {then!r:.200} when {since}, and is {now!r:.200} now: set it back, or change it in the next round"
        )


def append(one: Round, fields: Line) -> list[Line]:
    """Adds a line to the ledger; returns all lines."""
    return chain.append(one.root / LEDGER, one.lines, fields)


def policy(config: ConfigDict, one: Round, number: int) -> ConfigDict:
    """The config of the model that round `number` made; of the first model, for 0.

    Raises:
      UserError: its weights are gone, or an adapter that this way of tuning cannot go on from.
    """
    made = config.copy_and_resolve_references()
    if number == 0:
        return made
    line = next(line for line in one.lines if line["kind"] == "round" and line["round"] == number)
    weights = one.root / line["weights"]
    if not weights.is_dir():
        raise UserError(f"the weights of round {number} are gone: {weights}; put them back, or set guide.start_from")
    if not (weights / "adapter_config.json").exists():
        made.model.source, made.model.tokenizer, made.tune.adapter = str(weights), "", ""
        made.model.keep_layers = ()
    elif made.tune.method not in ("lora", "prompt"):
        raise UserError(
            f"round {number} made an adapter, which tune.method={made.tune.method!r} cannot go on from: set it back to 'lora'"
        )
    else:
        made.tune.adapter = str(weights)
    return made


def told_model(config: ConfigDict, number: int) -> dict[str, Any]:
    """What an item and a row say of the model that an output is from."""
    return {"model": config.model.source, "checkpoint": config.tune.adapter, "round": number}


def sha256(value: Any) -> str:
    """Of a text, of a file's bytes, or of a value as JSON."""
    if isinstance(value, Path):
        with value.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def pseudonyms(people: Sequence[str]) -> dict[str, str]:
    """People of a folder as "expert 1", "expert 2", … by their ids, in the order in which they are given."""
    return {one: f"expert {number}" for number, one in enumerate(dict.fromkeys(people), 1)}
