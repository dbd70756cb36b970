"""From a trained row back to where it comes from: verdicts, item, people, guideline, model, and the round that trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jaxtune.config import ConfigDict
from jaxtune.guidance import account
from jaxtune.guidance import folder as folder_lib
from jaxtune.lineage import chain
from jaxtune.review import store
from jaxtune.review.record import Item, Verdict
from jaxtune.types import UserError
from jaxtune.workdir import read_lines


def told(config: ConfigDict, root: Path) -> str:
    """What there is to be told of the row that `guide.trace` names, in lines; checked on the way: hashes of ledger and data.

    Raises:
      UserError: there is no such row, or a file or a verdict is not what the round trained on.
    """
    row, number = find(root, config.guide.trace)
    folder = root / f"round_{number:02d}"
    lines = chain.read(root / folder_lib.LEDGER)
    trained = next((one for one in lines if one["kind"] == "round" and one["round"] == number), None)
    data = folder_lib.read_json(folder / "data" / "data.json")["files"]
    for name, file in (trained["data"] if trained else data).items():
        if folder_lib.sha256(folder / "data" / name) != file["sha256"]:
            raise UserError(
                f"{folder / 'data' / name} is not what round {number} trained on (another SHA-256): put it back as it was"
            )
    taken = {one["id"]: one for one in read_lines(folder / "data" / "verdicts.jsonl")}
    with store.opened(folder_lib.database(config, root)) as engine:
        names = account.shown_names(config, engine)
        items = {one.id: one for one in store.read_items(engine, number, row["task"])}
        kept = {one.id: one for one in store.read_verdicts(engine, number, all_of_them=True)}
        guidelines = _guidelines(engine)
    parts = [_row(row, number, folder, trained)]
    parts += [_item(items[one]) for one in row.get("items", [row["item"]])]
    for verdict in row["verdicts"]:
        if verdict not in kept or Verdict(**taken[verdict]) != kept[verdict]:
            raise UserError(
                f"verdict {verdict} is not in the review database as round {number} took it: restore the database"
            )
        parts.append(_verdict(kept[verdict], names, guidelines))
    others = [one for one in taken.values() if one["item"] == row["item"] and one["id"] not in row["verdicts"]]
    if others:
        parts.append(f"{len(others)} other verdicts on this item: {', '.join(one['kind'] for one in others)}")
    return "\n".join(parts)


def find(root: Path, asked: str) -> tuple[dict[str, Any], int]:
    """(a trained row, the number of its round), by its id or as file:line.

    Raises:
      UserError: there is none.
    """
    name, _, number = asked.rpartition(":")
    if name and number.isdigit() and Path(name).expanduser().is_file():
        lines = read_lines(Path(name).expanduser())
        if not 1 <= int(number) <= len(lines):
            raise UserError(f"guide.trace={asked!r}: {name} has {len(lines)} lines")
        found = lines[int(number) - 1]
        if "verdicts" not in found:
            raise UserError(
                f"guide.trace={asked!r} is no row that guide made; expected one of round_NN/data/train.jsonl"
            )
        return found, int(found["round"])
    every = sorted(root.glob("round_*/data/*.jsonl"))
    for path in every:
        for row in read_lines(path):
            if row.get("id") == asked and "agreed" in row:
                return row, int(row["round"])
    raise UserError(
        f"guide.trace={asked!r}: no row of {root} has this id; expected the `id` of a row in round_NN/data/*.jsonl, or file:line"
    )


def _row(row: dict[str, Any], number: int, folder: Path, trained: dict[str, Any] | None) -> str:
    kept = {
        key: value
        for key, value in row.items()
        if key in ("prompt", "completion", "chosen", "rejected", "label", "completions", "scores", "text")
    }
    in_training = any(one.get("id") == row["id"] for one in read_lines(folder / "data" / "train.jsonl"))
    where = f"round {number}, task {row['task']!r}, {row['agreed']} of {row['asked']} experts"
    if trained is None:
        run = "not trained on yet"
    elif not in_training:
        run = f"no row of train.jsonl; the run reads it beside, or not at all; ledger line {trained['line']}"
    else:
        run = f"trained into {trained['weights']} ({trained['objective']}), ledger line {trained['line']}, {trained['hash'][:12]}…"
    return f"row {row['id']}: {where}\n  {_json(kept)}\n  {run}"


def _item(item: Item) -> str:
    origin = item.origin
    models = [
        f"{name}: {one['model']}"
        + (f" with {one['checkpoint']}" if one["checkpoint"] else "")
        + f", round {one['round']}"
        for name, one in origin.get("models", {}).items()
    ]
    made_by = f"\n  outputs by {'; '.join(models)}" if models else ""
    where = (
        f"{origin.get('source', '')}, row {origin.get('row', '')}, SHA-256 {str(origin.get('row_sha256', ''))[:12]}…"
    )
    return f"item {item.id}: {where}\n  asked: {_json(item.payload)}{made_by}"


def _verdict(one: Verdict, names: dict[str, str], guidelines: dict[int, str]) -> str:
    order = f", shown in the order {', '.join(one.shown['order'])}" if one.shown.get("order") else ""
    suggested = ", with a suggestion" if one.shown.get("prelabel") else ""
    settles = ", settles a disagreement" if one.adjudicates else ""
    return (
        f"verdict {one.id}: {names.get(one.person, one.person)}, {account.moment(one.at)}, after {one.seconds:.1f} s{order}{suggested}{settles}\n"
        f"  {one.kind}: {_json(one.answer)}; guideline {guidelines.get(one.guideline, 'none')}"
    )


def _guidelines(engine: store.Engine) -> dict[int, str]:
    """Each guideline by its number, in words: version and hash."""
    table = store.guidelines
    with engine.connect() as connection:
        rows = list(connection.execute(sa.select(table.c.number, table.c.version, table.c.text)))
    return {number: f"version {version} (SHA-256 {folder_lib.sha256(text)[:12]}…)" for number, version, text in rows}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
