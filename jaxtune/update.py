"""The verb `update`: from the last released model and new data to the next release, or to a refusal that says why.

`lineage.folder` is a folder: `ledger.jsonl` and `ledger.md` say what was released and from what, and `attempts/NNN` holds
each candidate: its config, its run (`train/`), what every model scored row by row (`results/`), the new rows most unlike the
old (`unlike.jsonl`), the rows that got worse (`worse.jsonl`) and the report. The same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune import checkpoint, sweep, tracking
from jaxtune import config as config_lib
from jaxtune.config import ConfigDict
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import protected
from jaxtune.evals.protected import Protected, Verdict
from jaxtune.lineage import account, chain, comparing, gate, ledger, matrix, scores, stages
from jaxtune.lineage.ledger import Line
from jaxtune.lineage.scores import Results
from jaxtune.lineage.stages import Stage
from jaxtune.train import preferences
from jaxtune.train import start as start_lib
from jaxtune.train.loop import Preempted
from jaxtune.types import RESUME_EXIT_CODE, UserError
from jaxtune.weights.source import Model
from jaxtune.workdir import write_lines, write_whole


class Known(NamedTuple):
    """What an update knows before it does anything: the lineage, the released model's line, the stages so far, and the new one.

    `beside`: the protected sets; None where an objective's way of reading rows depends on the device, and they wait for it.
    """

    folder: Path
    lines: list[Line]
    parent: Line
    earlier: list[Stage]
    new: Stage
    model: Model
    tokenizer: Tokenizer
    beside: list[Protected] | None
    notes: list[str]

    @property
    def path(self) -> list[Line]:
        """The lines of the releases that led here, the base's first."""
        return [self.lines[0], *ledger.ancestry(self.lines, self.parent["release"])]


def update(config: ConfigDict, workdir: Path, start: sweep.Start | None = None) -> None:
    """Trains a candidate on new data and replay, measures it, and releases it where it is no worse than the released model.

    Raises:
      UserError: the lineage, the data or the config are not in order; or the gate refuses the candidate, which is then in the
        ledger, and the released model stays.
      Preempted: the training was stopped, and saved.
    """
    if not config.lineage.folder:
        raise UserError(
            "update needs --config.lineage.folder=FOLDER: the releases of a model, or a path where there is nothing"
        )
    folder = Path(config.lineage.folder).expanduser()
    with ledger.opened(folder) as lock:
        if config.lineage.rollback >= 0:
            return _roll_back(config, folder)
        known = _known(config, folder)
        attempt = _attempt(config, known)
        _train(config, known, attempt, start or partial(sweep.in_a_process, keep=(lock,)))
        sets, results = _measure(config, known, attempt)
        drift = _drift(config, known, attempt)
        verdicts = protected.judge(sets, results["released"], results["candidate"])
        line = _judge(config, known, attempt, sets, verdicts, results, drift)
        lines = ledger.append(folder, known.lines, line)
        account.write(config, attempt, lines, _matrix(known, line, sets, results), drift, verdicts)
        if line["verdict"] == "refused":
            raise UserError(
                f"refused: {line['reason']}; release {known.parent['release']} stays. The rows that got worse are in "
                f"{attempt / 'worse.jsonl'}; to release it all the same: --config.lineage.force='the reason'"
            )
        print(f"release {line['release']} is current: {folder / line['weights']}")


def _roll_back(config: ConfigDict, folder: Path) -> None:
    wanted = config.lineage.rollback
    lines = ledger.roll_back(folder, ledger.read(folder), wanted, config.lineage.force)
    line = ledger.releases(lines)[wanted]
    print(f"release {wanted} is current again: {folder / line['weights'] if wanted else line['model']}")


def _known(config: ConfigDict, folder: Path) -> Known:
    """Reads the lineage and the rows, and refuses what is not in order; begins the ledger where there is none.

    No device is touched, for on some machines only one process may hold it, and training is to be that one.
    """
    show, lines = _progress(config), ledger.read(folder)
    model, tokenizer = stages.tokenizer_of(config)
    base = {"kind": "base", "release": 0, "name": "base", "model": config.model.source, "adapter": config.tune.adapter}
    base |= {"fingerprint": stages.fingerprint(model), "versions": chain.versions()}
    if lines:
        stages.check_base(folder, lines[0], config, model)
    made_from = ledger.ancestry(lines, ledger.current(lines))
    earlier, notes = stages.earlier(folder, made_from, config.lineage.on_changed_data, tokenizer, show)
    release = 1 + max(ledger.releases(lines), default=0)
    new = stages.read(config, release, stages.named(config.name, release, earlier), tokenizer, show)
    notes += stages.check_new(new, earlier)
    gate.check_names(config, [*(stage.name for stage in earlier), new.name])
    for note in notes:
        sweep.say(config, f"note: {note}")
    waits = config.train.objective in preferences.READERS
    beside = None if waits else _beside(config, model, tokenizer)
    lines = lines or ledger.append(folder, [], base)
    return Known(folder, lines, made_from[-1] if made_from else lines[0], earlier, new, model, tokenizer, beside, notes)


def _beside(config: ConfigDict, model: Model, tokenizer: Tokenizer) -> list[Protected]:
    return protected.read(config, tokenizer, _progress(config), start_lib.reader(config, model, tokenizer))


def _attempt(config: ConfigDict, known: Known) -> Path:
    """The folder of this candidate: one that the same command began, else a new one."""
    root = known.folder / "attempts"
    numbers = sorted(int(path.name) for path in root.glob("[0-9]*") if path.is_dir()) if root.exists() else []
    began = {"parent": known.parent["hash"], "data": known.new.digest, "earlier": [s.digest for s in known.earlier]}
    for number in reversed(numbers):
        file = root / f"{number:03d}" / "began.json"
        saved = json.loads(file.read_text("utf-8")) if file.exists() else {}
        if {key: saved.get(key) for key in began} == began:
            shares = saved["replay_share"], config.lineage.replay_share
            free = tuple(name for name in checkpoint.free(config) if name != "export.")
            changed = checkpoint.first_change(saved["config"], config, free)
            if changed is None and shares[0] == shares[1]:
                return file.parent
            key, then, now = changed or ("lineage.replay_share", *shares)
            sweep.say(
                config, f"attempt {number} is of another config ({key} was {then!r}, is {now!r}): a new one is begun"
            )
    folder = root / f"{max(numbers, default=0) + 1:03d}"
    told = {**began, "replay_share": config.lineage.replay_share, "config": json.loads(config_lib.to_json(config))}
    write_whole(folder / "began.json", json.dumps(told, indent=2) + "\n")
    return folder


def _train(config: ConfigDict, known: Known, attempt: Path, start: sweep.Start) -> None:
    """Trains the candidate in a process of its own, or what is missing of it.

    Raises:
      UserError: with the last line of its log.
      Preempted: it was stopped, and saved.
    """
    if (attempt / "trained.json").exists():
        return
    made = training(config, known, attempt)
    write_whole(attempt / "train.json", config_lib.to_json(made) + "\n")
    run, log = attempt / "train", attempt / "train.txt"
    replayed = ", ".join(stage.name for stage in known.earlier) if config.lineage.replay_share else ""
    sweep.say(
        config,
        f"training {known.new.name} from release {known.parent['release']}"
        + (f", with replay of {replayed}" if replayed else ""),
    )
    code = start(attempt / "train.json", run, checkpoint.is_used(str(run)), log)
    if code == RESUME_EXIT_CODE:
        raise Preempted(f"stopped while the candidate in {attempt} was trained; saved")
    if code:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        raise UserError(
            f"the candidate was not trained, and the released model stays: {said[-1] if said else f'exit code {code}'} ({log})"
        )
    write_whole(attempt / "trained.json", json.dumps({"weights": _result(run)}) + "\n")


def training(config: ConfigDict, known: Known, attempt: Path) -> ConfigDict:
    """The config of the candidate's run: from the released weights, on the new rows and replay of earlier stages'."""
    made = stages.of_release(config, known.folder, known.parent)
    made.workdir, made.lineage = str(attempt / "train"), config_lib.base().lineage
    made.export.output, made.checkpoint.resume, made.eval.before_after = "", False, True
    made.retain.replay = (*config.retain.replay, *stages.replay(known.earlier, config.lineage.replay_share))
    if config.protect.on_broken == "report" and not config.protect.every_steps:
        made.protect.sets = ()  # they are measured here, row by row
    return made


def _result(run: Path) -> str:
    return next(name for name in ("adapter", "model") if (run / name).is_dir())


def _measure(config: ConfigDict, known: Known, attempt: Path) -> tuple[list[Protected], dict[str, Results]]:
    """The sets that a release is held to, and what candidate, released model and base score on them; kept in the attempt."""
    every = [*known.earlier, known.new]
    own = [scores.of_stage(stage, config.lineage.margin, known.model, known.tokenizer) for stage in every]
    show, beside = _progress(config), known.beside
    beside = _beside(config, known.model, known.tokenizer) if beside is None else beside
    sets = gate.margins([*own, *beside], config.lineage.margins)
    found = scores.of_training(attempt / "train", own[-1])
    if found is not None:
        scores.keep(attempt, "released", own[-1:], {known.new.name: found[0]})
        scores.keep(attempt, "candidate", own[-1:], {known.new.name: found[1]})
    earlier = [known.folder / Path(line["weights"]).parents[1] for line in known.path[1:]]
    base = [(attempt, "base"), *((path, "base") for path in earlier)]
    from_base = [(attempt, "released")] if not earlier else []
    candidate = known.parent | {"kind": "update", "release": known.new.release}
    candidate["weights"] = str((attempt / "train" / _result(attempt / "train")).relative_to(known.folder))
    models = {
        "base": (known.lines[0], [*base, *from_base]),
        "released": (
            known.parent,
            [(attempt, "released"), *((path, "candidate") for path in earlier[-1:]), *(base if not earlier else [])],
        ),
        "candidate": (candidate, [(attempt, "candidate")]),
    }
    results: dict[str, Results] = {}
    for whose, (line, places) in models.items():
        known_ones = scores.read(sets, places)
        missing = [one for one in sets if one.name not in known_ones]
        named = stages.of_release(config, known.folder, line)
        measured = scores.measured(named, missing, known.tokenizer, show, whose, partial(sweep.say, config))
        scores.keep(attempt, whose, missing, measured)
        results[whose] = {one.name: {**known_ones, **measured}[one.name] for one in sets}
    return sets, results


def _matrix(known: Known, line: Line, sets: Sequence[Protected], results: dict[str, Results]) -> matrix.Matrix:
    """What base, releases and candidate score on the stages, from what the attempts keep."""
    own, path = list(sets[: len(known.earlier) + 1]), known.path
    attempts = [known.folder / Path(one["weights"]).parents[1] for one in path[1:]]
    attempts.append(known.folder / Path(line["weights"]).parents[1])
    cells = []
    for number in range(len(path)):
        # A release's own attempt measured it on all stages so far, the next one on the stage that came then.
        places = [(attempts[number - 1], "candidate")] if number else [(attempt, "base") for attempt in attempts]
        found = scores.read(own, [*places, (attempts[number], "released")])
        cells.append([found.get(one.name) for one in own])
    cells[0] = [results["base"][one.name] for one in own]
    cells.append([results["candidate"][one.name] for one in own])
    said = "" if line["verdict"] == "released" else f", {line['verdict']}"
    names = [
        "base",
        *(f"{one['release']} {one['name']}" for one in path[1:]),
        f"{known.new.release} {line['name']}{said}",
    ]
    return matrix.Matrix(names, own, cells)


def _drift(config: ConfigDict, known: Known, attempt: Path) -> comparing.Drift:
    """How the new rows differ from the earlier stages'; kept in the attempt. Nothing where there are none."""
    if not known.earlier or not config.lineage.drift_rows:
        return comparing.Drift({}, [])
    sweep.say(config, "comparing new rows with old")
    base = config.copy_and_resolve_references()
    found = comparing.compare(
        config, known.new, known.earlier, known.tokenizer, comparing.embedder(base, _progress(config))
    )
    write_lines(attempt / "unlike.jsonl", found.unlike)
    return found


def _judge(
    config: ConfigDict, known: Known, attempt: Path, sets: Sequence[Protected], verdicts: dict[str, Verdict],
    results: dict[str, Results], drift: comparing.Drift,
) -> Line:  # fmt: skip
    """The candidate's line in the ledger; writes the rows that got worse."""
    decide, force = config.lineage.decide, config.lineage.force
    broken = [one for one in sets if not gate.passes(verdicts[one.name], decide)]
    told = [gate.told(one.name, verdicts[one.name], decide, len(results["candidate"][one.name].rows)) for one in broken]
    worse = [
        row
        for one in broken or sets
        for row in gate.worse_rows(one, results["released"][one.name], results["candidate"][one.name])
    ]
    write_lines(attempt / "worse.jsonl", worse)
    refused = bool(broken) and not force
    relative = attempt.relative_to(known.folder)
    return {
        "kind": "update", "release": None if refused else known.new.release, "parent": known.parent["release"], "name": config.name,
        "verdict": "refused" if refused else "forced" if broken else "released",
        "reason": "; ".join(told) + (f"; forced: {force}" if broken and force else ""),
        "config": _kept_config(config, known.folder, attempt),
        "data": {"files": known.new.files, "rows": dict(known.new.splits.counts), "digest": known.new.digest},
        "replay": {"share": config.lineage.replay_share, "stages": [stage.name for stage in known.earlier]}
        if known.earlier and config.lineage.replay_share else None,
        "versions": chain.versions(), "weights": str(relative / "train" / _result(attempt / "train")),
        "scores": {one.name: account.score(verdicts[one.name]) for one in sets},
        "drift": {name: {**shift._asdict(), "shifted": shift.p_holm < config.lineage.drift_alpha} for name, shift in drift.shifts.items()},
        "notes": known.notes,
    }  # fmt: skip


def _kept_config(config: ConfigDict, folder: Path, attempt: Path) -> dict[str, str]:
    """Writes the config beside the candidate, beside others by which it was judged before; its path and hash."""
    text = config_lib.to_json(config) + "\n"
    names = (f"config{f'_{n}' if n > 1 else ''}.json" for n in count(1))
    path = next(p for p in (attempt / name for name in names) if not p.exists() or p.read_text("utf-8") == text)
    write_whole(path, text)
    return {"path": str(path.relative_to(folder)), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _progress(config: ConfigDict) -> Any:
    return partial(tracking.progress, mode=config.tracking.progress)
