"""The verb `review`: the page on which experts answer, who may come in, and what goes into the database and out of it.

    jaxtune review --config=C                                                           serves the page
    jaxtune review --config=C --config.review.action=invite --config.review.person=Ann --config.review.role=senior
    jaxtune review --config=C --config.review.action=import --config.review.file=rows.jsonl --config.review.task=tone
    jaxtune review --config=C --config.review.action=export --config.review.format=label_studio
    jaxtune review --config=C --config.review.action=report

No device is started: the machine that serves the page need not be the one that trains.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxtune import fetch
from jaxtune.config import ConfigDict
from jaxtune.data import privacy
from jaxtune.review import tasks as tasks_lib
from jaxtune.review.tasks import Task
from jaxtune.types import UserError
from jaxtune.workdir import write_whole

_NEEDS = {
    "sqlalchemy": "SQLAlchemy", "pg8000": "pg8000", "argon2": "argon2-cffi", "fastapi": "FastAPI", "uvicorn": "uvicorn",
    "python_multipart": "python-multipart", "markdown_it": "markdown-it-py",
}  # fmt: skip
_FIRST_OWNER = "owner"  # name of the account that the first start makes
_SHOWN = 5  # broken records that are printed
_REPORT = "review_report.html"  # where the page looks for it


def review(config: ConfigDict, workdir: Path) -> None:
    """Does what `review.action` says.

    Raises:
      UserError: an extra is missing, the config or a file is not in order, the database cannot be reached or its disk is full.
    """
    if lacking := [name for module, name in _NEEDS.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"review needs {', '.join(lacking)}: pip install 'jaxtune[review]'")
    from jaxtune.review import store

    tasks = tasks_lib.read(config.review.tasks)
    if not tasks:
        raise UserError(
            'review.tasks is empty; name at least one task, such as (("tone", (("kind", "label"), ("labels", ("good", "bad")))),)'
        )
    actions = {"serve": _serve, "invite": _invite, "import": _import, "export": _export, "report": _report}
    with store.opened(_database(config, workdir)) as engine:
        actions[config.review.action](config, engine, tasks, workdir)


def _database(config: ConfigDict, workdir: Path) -> str:
    if not config.review.database and "://" in config.workdir:
        raise UserError(
            f"workdir={config.workdir!r}: a database cannot be in Cloud Storage; set review.database to a file of this machine or postgresql://…"
        )
    return config.review.database or str(workdir / "review.db")


def _serve(config: ConfigDict, engine: Any, tasks: dict[str, Task], workdir: Path) -> None:
    from jaxtune.review import people
    from jaxtune.review.server import app

    owners = [one for one in people.everyone(engine) if people.may(one, "owner")]
    able = {one.id for one in owners if people.has_password(engine, one.id)}
    if not able:  # nobody could let the others in: the first start, or its link was lost
        owner = owners[0] if owners else people.add(engine, people.free_name(engine, _FIRST_OWNER), "owner")
        print(
            f"sign in as {owner.name!r} by this link, which is good once: {_link(config, people.invite(engine, owner.id))}"
        )
    with suppress(KeyboardInterrupt):  # uvicorn raises it, or does not, as the moment has it
        app.serve(config, engine, tasks, str(workdir))


def _invite(config: ConfigDict, engine: Any, tasks: dict[str, Task], workdir: Path) -> None:
    from jaxtune.review import people

    c = config.review
    if not c.person:
        raise UserError("whom? Give --config.review.person=NAME, and a role if it is another than expert")
    wanted = {task.skill for task in tasks.values()} - {""}
    if unknown := [one for one in c.skills if one not in wanted]:
        raise UserError(f"no task needs the skill {unknown[0]!r}; tasks need {', '.join(sorted(wanted)) or 'none'}")
    known = people.named(engine, c.person)
    person = known or people.add(engine, c.person, c.role, tuple(c.skills))
    token = people.invite(engine, person.id, c.invite_days * 86400.0)
    again = ", who has an account: a new password can be set" if known else ""
    print(f"for {person.name}, {person.role}{again}; good once, for {c.invite_days:g} days: {_link(config, token)}")


def _link(config: ConfigDict, token: str) -> str:
    c = config.review
    host = f"[{c.host}]" if ":" in c.host else c.host
    here = f"{'https' if c.tls_cert else 'http'}://{host}:{c.port}"
    return f"{c.address.rstrip('/') or here}/invite/{token}"


def _import(config: ConfigDict, engine: Any, tasks: dict[str, Task], workdir: Path) -> None:
    from jaxtune.review import exchange

    c = config.review
    if not c.file:
        raise UserError("what? Give --config.review.file=FILE, and its format if it is another than jsonl")
    path = fetch.local(c.file)
    hidden = privacy.of(config.privacy)
    private = None if hidden is None else lambda payload: hidden.row(payload)[0]
    found = exchange.read_file(engine, tasks, path, c.format, c.task, c.round, tuple(c.columns), private)
    print(
        f"{found.items} items are new, {found.known_items} were there; {found.verdicts} verdicts are new, "
        f"{found.known_verdicts} were there; {found.people} people were not known, and have closed accounts"
    )
    listed = workdir / f"{path.name}.broken.jsonl"
    listed.unlink(missing_ok=True)
    if found.broken:
        exchange.write_broken(listed, found.broken)
        for one in found.broken[:_SHOWN]:
            print(f"  line {one.line}: {one.reason}")
        print(f"{len(found.broken)} records or parts of them were left out; all are listed in {listed}")


def _export(config: ConfigDict, engine: Any, tasks: dict[str, Task], workdir: Path) -> None:
    from jaxtune.review import exchange

    c = config.review
    path = (
        Path(c.file).expanduser()
        if c.file
        else workdir / ("export.jsonl" if c.format == "jsonl" else f"{c.format}.json")
    )
    if path.is_dir():
        raise UserError(f"review.file={c.file!r} is a folder; expected the path of a file")
    round, task = (None, None) if c.everything else (c.round, c.task or None)
    if task is not None and task not in tasks:
        raise UserError(f"review.task={task!r} is not in review.tasks ({', '.join(tasks)})")
    items, verdicts = exchange.write_file(engine, tasks, path, c.format, round, task, c.pseudonyms)
    print(f"{items} items and {verdicts} verdicts: {path}")


def _report(config: ConfigDict, engine: Any, tasks: dict[str, Task], workdir: Path) -> None:
    from jaxtune.review import insight, queue

    queue.check_kinds(engine, tasks, config.review.round)
    insight.write(engine, tasks, config.review.round, workdir / "review")
    page = (workdir / "review" / "report.html").read_text(encoding="utf-8")
    write_whole(workdir / _REPORT, page)
    print(f"figures of round {config.review.round}: {workdir / 'review' / 'report.html'}")
