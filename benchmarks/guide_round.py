"""A whole round of guidance with simulated experts: outputs, queue, verdicts, rows, training, evaluation, blind comparison, trace.

    python benchmarks/guide_round.py [--folder runs/guide_round] [--rows 100] [--experts 6] [--no-record]

Each simulated expert is one of the twenty people who rated every sentence of the reviews (vaderSentiment's archive): it holds the
number that person gave, real noise included, and goes through the queue as people do, an item at a time. A rating below -0.5 means
"negative", from 0.5 on "positive", else "neutral". It corrects an answer to that word. Of two answers it prefers the one whose label
is nearer to its own; equally near is a tie, and "none is good" where neither names a label. The commands are those that a user types;
the table goes to docs/guiding.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "guide_reviews.py"
PAGE, MARK = ROOT / "docs" / "guiding.md", "<!-- guide_round.py writes below -->"
LABELS = ("negative", "neutral", "positive")
ARCHIVE = "pypi:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz#hutto_ICWSM_2014/"


def ratings() -> dict[str, list[float]]:
    """Each sentence's ratings, by the number of its line in the file of sentences."""
    from jaxtune import fetch

    def lines(name: str) -> list[list[str]]:
        text = fetch.local(ARCHIVE + f"amazonReviewSnippets_{name}.txt").read_text("utf-8-sig", errors="replace")
        return [line.split("\t") for line in text.splitlines() if line.strip()]

    by_id = {cells[0]: json.loads(cells[3]) for cells in lines("anonDataRatings")}
    return {str(number): by_id[cells[0]] for number, cells in enumerate(lines("GroundTruth"), 1)}


def word(rating: float) -> str:
    return LABELS[0 if rating < -0.5 else 1 if rating < 0.5 else 2]


def named(text: str) -> str | None:
    """The one label that an answer names; None where it names none or several."""
    found = {label for label in LABELS if re.search(rf"\b{label}\b", text.lower())}
    return found.pop() if len(found) == 1 else None


def answer(payload: dict[str, Any], own: str) -> dict[str, Any]:
    """What someone who thinks `own` says."""
    if "answer" in payload:
        return {"text": own}
    far = {}
    for one in payload["candidates"]:
        label = named(one["text"])
        far[one["id"]] = 3 if label is None else abs(LABELS.index(label) - LABELS.index(own))
    groups = [[one for one in sorted(far) if far[one] == distance] for distance in sorted(set(far.values()))]
    return {"order": groups, "bad": min(far.values()) == 3}


def answer_all(database: str, config: Any, num_experts: int) -> int:
    """Everybody in turn takes an item from the queue and answers it, until nothing is left; returns how many answers were given."""
    from jaxtune.review import people, queue, store, tasks
    from jaxtune.review.record import Verdict

    every, known, given = tasks.read(config.review.tasks), ratings(), 0
    with store.opened(database) as engine:
        team = people.everyone(engine) or [
            people.add(engine, f"rater {n}", "expert") for n in range(1, num_experts + 1)
        ]
        rows = {item.id: item.origin["row"].rpartition(":")[2] for item in store.read_items(engine, config.guide.round)}
        waiting = list(enumerate(team))
        while waiting:
            still = []
            for number, person in waiting:
                assigned = queue.assign(engine, person, every, config.guide.round)
                if assigned is None:
                    continue
                item, began = assigned.item, time.monotonic()
                said = answer(item.payload, word(known[rows[item.id]][number]))
                took = time.monotonic() - began
                verdict = Verdict(uuid.uuid4().hex, item.id, person.id, every[item.task].kind, said, {}, 0, took)
                assert queue.submit(engine, person, every, verdict)
                given += 1
                still.append((number, person))
            waiting = still
    return given


def command(folder: Path, options: argparse.Namespace, *more: str) -> int:
    """`jaxtune guide` as a user types it; what it says goes on to the terminal."""
    flags = [f"--config={CONFIG}", f"--workdir={folder}", f"--config.guide.rows={options.rows}"]
    flags += [f"--config.guide.compare_rows={options.compared}", f"--config.train.steps={options.steps}"]
    flags += [f"--config.eval.limit={options.held_out}", *more]
    return subprocess.run([sys.executable, "-m", "jaxtune.launch", "guide", *flags], cwd=ROOT).returncode


def play(options: argparse.Namespace) -> dict[str, Any]:
    """The round, from nothing to its report; what the ledger says of it."""
    import runpy

    from jaxtune.lineage import chain

    folder, config = options.folder.resolve(), runpy.run_path(str(CONFIG))["get_config"]()
    waits, answers = 0, 0
    while (code := command(folder, options)) == 75:
        waits += 1
        assert waits <= 2, "a round waits for its answers, and for its comparison"
        answers += answer_all(str(folder / "review.db"), config, options.experts)
    assert code == 0, code
    _, trained, compared = chain.read(folder / "ledger.jsonl")
    row = json.loads((folder / "round_01" / "data" / "train.jsonl").read_text().splitlines()[0])
    assert command(folder, options, f"--config.guide.trace={row['id']}") == 0
    return {"trained": trained, "compared": compared}


def page(found: dict[str, Any]) -> str:
    trained, compared = found["trained"], found["compared"]
    data = {name.removesuffix(".jsonl"): file["rows"] for name, file in trained["data"].items()}
    lines = [
        f"Asked: {', '.join(f'{num} items of `{name}`' for name, num in trained['items'].items())}; "
        f"{trained['verdicts']['verdicts']} verdicts of {trained['verdicts']['people']} simulated experts. "
        f"Rows: {data.get('sft', 0)} answers, {data.get('pairs', 0)} pairs. "
        f"Training took {trained['seconds']['training']:.0f} s on two busy CPU cores, outputs {trained['seconds']['sampling']:.0f} s.",
        "",
        "| left out | items | because |",
        "|---|---|---|",
    ]
    for task, reasons in trained["left_out"].items():
        lines += [f"| `{task}` | {num} | {reason.replace('_', ' ')} |" for reason, num in reasons.items()]
    for task, reasons in trained["not_asked"].items():
        lines += [
            f"| `{task}`, before anybody was asked | {num} | {reason.replace('_', ' ')} |"
            for reason, num in reasons.items()
        ]
    lines += ["", "| set | metric | before | after | worse by |", "|---|---|---|---|---|"]
    for name, one in trained["scores"].items():
        lines.append(
            f"| {name} | {one['metric']} | {_cell(one['released'])} | {_cell(one)} | {_cell(one['worsening'])} |"
        )
    lines += [
        "",
        f"Old against new, blind, {compared['wins'] + compared['ties'] + compared['losses']} held-out sentences: new better "
        f"{compared['wins']}, ties {compared['ties']} (of which {compared['same_answers']} equal answers), old better {compared['losses']}; "
        f"win rate {_cell(compared['rate'])}, sign test p = {compared['p']:.2g}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(e: dict[str, float]) -> str:
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "guide_round")
    parser.add_argument("--rows", type=int, default=100, help="items of each of the two tasks")
    parser.add_argument("--compared", type=int, default=60, help="held-out sentences of the blind comparison")
    parser.add_argument("--held-out", type=int, default=300, help="held-out sentences that are scored")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--experts", type=int, default=6, help="simulated experts, 20 at most")
    parser.add_argument("--no-record", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    text = page(play(options))
    print(text)
    if not options.no_record:
        before, mark, _ = PAGE.read_text().partition(MARK)
        assert mark, f"{PAGE} lost the line {MARK}"
        PAGE.write_text(f"{before}{MARK}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
