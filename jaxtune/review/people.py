"""Who may come in: accounts, passwords (argon2id), one-time invites, sessions, roles, and the audit log of all that.

Tokens of invites and sessions have 256 bits and are told once; the database keeps their SHA-256. A session's CSRF token
follows from its token, so the database alone gives neither. Passwords are normalised (NFKC), hashed with the defaults of
argon2-cffi, and hashed anew at a sign-in after those defaults have changed.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import time
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from jaxtune.review.record import MODEL, ROLES, Person
from jaxtune.review.store import Engine, audit, invites, note, people, sessions, writing
from jaxtune.types import UserError

MIN_PASSWORD = 12  # characters
MAX_PASSWORD = 1024
MAX_NAME = 200
INVITE_SECONDS = 7 * 86400.0
SESSION_SECONDS = 12 * 3600.0  # a session ends then, whatever is done in it
IDLE_SECONDS = 2 * 3600.0  # and so long after the last request
_SEEN_SECONDS = 60.0  # a request is noted at most so often, for a note is a write


def may(person: Person, role: str) -> bool:
    """Whether someone may do what `role` may: owners all, seniors what experts may and more."""
    return person.active and ROLES.index(person.role) >= ROLES.index(role)


def add(
    engine: Engine, name: str, role: str, skills: Sequence[str] = (), password: str | None = None, *,
    by: str | None = None, address: str = "",
) -> Person:  # fmt: skip
    """Makes an account. Without a password it is entered by an invite.

    Raises:
      UserError: the name is taken (case does not count) or none, the role is not known, or the password is too weak.
    """
    person = Person(secrets.token_hex(8), _name(name), _role(role), _skills(skills))
    hashed = None if password is None else _hash(password, person.name)
    with writing(engine) as connection:
        _one_at_a_time(connection)
        if _find(connection, person.name) is not None:
            raise UserError(f"there is someone of the name {person.name!r}; choose another name")
        row = person._asdict() | {"skills": list(person.skills), "password_hash": hashed, "at": time.time()}
        connection.execute(people.insert().values(row))
        note(connection, "person", person.id, by, address, name=person.name, role=role, skills=list(person.skills))
    return person


def everyone(engine: Engine) -> list[Person]:
    """All accounts, in the order in which they were made, those that are closed included; model judges are none."""
    query = sa.select(people).where(~people.c.id.startswith(MODEL)).order_by(people.c.at)
    with engine.connect() as connection:
        return [_person(row) for row in connection.execute(query).mappings()]


def named(engine: Engine, name: str) -> Person | None:
    """The account of a name; case does not count."""
    with engine.connect() as connection:
        row = _find(connection, name)
    return None if row is None else _person(row)


def is_taken(connection: sa.Connection, name: str) -> bool:
    """Whether someone has the name; case does not count."""
    return _find(connection, name) is not None


def has_password(engine: Engine, person_id: str) -> bool:
    """Whether someone can sign in without an invite."""
    with engine.connect() as connection:
        return _known(connection, person_id)["password_hash"] is not None


def free_name(engine: Engine, name: str) -> str:
    """The name, with a number where it is taken."""
    numbered = (f"{name} {number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if named(engine, one) is None)


def change(
    engine: Engine, person_id: str, role: str | None = None, skills: Sequence[str] | None = None,
    active: bool | None = None, *, by: str | None = None, address: str = "",
) -> Person:  # fmt: skip
    """Changes what is not None; closing an account ends its sessions and voids its invites.

    Raises:
      UserError: nobody has this id, the role is not known, or no active owner would be left.
    """
    new: dict[str, Any] = {} if role is None else {"role": _role(role)}
    new |= {} if skills is None else {"skills": list(_skills(skills))}
    new |= {} if active is None else {"active": active}
    with writing(engine) as connection:
        _one_at_a_time(connection)
        before = _known(connection, person_id)
        after = _person(before | new)
        owners = connection.scalars(sa.select(people.c.id).where(people.c.role == "owner", people.c.active)).all()
        if list(owners) == [person_id] and not may(after, "owner"):
            raise UserError(f"{after.name!r} is the only owner; make another owner first")
        if new:
            connection.execute(people.update().where(people.c.id == person_id).values(new))
            note(connection, "change", person_id, by, address, **new)
        if not after.active:
            _end_sessions(connection, person_id)
            _void_invites(connection, person_id)
    return after


def invite(
    engine: Engine, person_id: str, valid_seconds: float = INVITE_SECONDS, *, by: str | None = None, address: str = ""
) -> str:
    """Returns a one-time token with which someone signs in and may set a password; earlier ones are void.

    Raises:
      UserError: nobody has this id, or the account is closed.
    """
    token, now = secrets.token_urlsafe(32), time.time()
    with writing(engine) as connection:
        person = _person(_known(connection, person_id))
        if not person.active:
            raise UserError(f"the account of {person.name!r} is closed; open it first")
        _void_invites(connection, person_id)
        row = {"token_sha256": _sha256(token), "person": person_id, "at": now, "expires": now + valid_seconds}
        connection.execute(invites.insert().values(row))
        note(connection, "invite", person_id, by, address, valid_seconds=valid_seconds)
    return token


def invited(engine: Engine, token: str) -> Person:
    """Whose invite this is; it is not used up.

    Raises:
      UserError: it is unknown, used or expired, or the account is closed.
    """
    with engine.connect() as connection:
        return _invited(connection, token)


def accept_invite(engine: Engine, token: str, password: str | None, *, address: str = "") -> Person:
    """Uses up an invite; a password that comes with it becomes the account's and ends its sessions.

    Raises:
      UserError: it is unknown, used or expired, or the account is closed; or the password is too weak, and the invite stays.
    """
    hashed = None if password is None else _hash(password, invited(engine, token).name)
    with writing(engine) as connection:
        person = _invited(connection, token)
        unused = sa.and_(invites.c.token_sha256 == _sha256(token), invites.c.used_at.is_(None))
        if connection.execute(invites.update().where(unused).values(used_at=time.time())).rowcount != 1:
            raise UserError("this invite was used; ask for a new one")  # meanwhile, by another request
        if hashed is not None:
            connection.execute(people.update().where(people.c.id == person.id).values(password_hash=hashed))
            _end_sessions(connection, person.id)
        note(connection, "invite_used", person.id, person.id, address, password=hashed is not None)
    return person


def check_password(engine: Engine, name: str, password: str, *, address: str = "") -> Person | None:
    """The person whose name and password these are, or None; an unknown name takes as long as a wrong password."""
    from argon2.exceptions import InvalidHashError, VerificationError

    with engine.connect() as connection:
        row = _find(connection, name)
    kept = None if row is None or not row["active"] else row["password_hash"]
    password = unicodedata.normalize("NFKC", password)[: MAX_PASSWORD + 1]
    try:
        right = _hasher().verify(kept or _nobodys_hash(), password) and kept is not None
    except (VerificationError, InvalidHashError):
        right = False
    with writing(engine) as connection:
        if row is None or not right:  # what was typed as a name may have been a password: it is not kept
            note(connection, "sign_in_failed", "" if row is None else row["id"], None, address)
            return None
        assert kept is not None
        if _hasher().check_needs_rehash(kept):
            still = sa.and_(people.c.id == row["id"], people.c.password_hash == kept)
            connection.execute(people.update().where(still).values(password_hash=_hasher().hash(password)))
        note(connection, "sign_in", row["id"], row["id"], address)
    return _person(row)


def set_password(
    engine: Engine, person_id: str, password: str, *, keep: str = "", by: str | None = None, address: str = ""
) -> None:
    """Sets a password and ends the person's sessions, but for that of the token `keep`.

    Raises:
      UserError: nobody has this id, or the password is too weak.
    """
    with engine.connect() as connection:
        hashed = _hash(password, _known(connection, person_id)["name"])
    with writing(engine) as connection:
        connection.execute(people.update().where(people.c.id == person_id).values(password_hash=hashed))
        _end_sessions(connection, person_id, keep)
        _void_invites(connection, person_id)
        note(connection, "password", person_id, by or person_id, address)


def start_session(
    engine: Engine, person: Person, valid_seconds: float = SESSION_SECONDS, *, address: str = ""
) -> tuple[str, str]:
    """Returns the tokens of a new session: for the cookie, and against forged requests."""
    token, now = secrets.token_urlsafe(32), time.time()
    row = {"token_sha256": _sha256(token), "person": person.id, "csrf": _sha256(_csrf(token)), "at": now, "seen": now}
    with writing(engine) as connection:
        connection.execute(sessions.insert().values(row | {"expires": now + valid_seconds}))
        note(connection, "session", person.id, person.id, address)
    return token, _csrf(token)


def session(engine: Engine, token: str, *, idle_seconds: float = IDLE_SECONDS) -> tuple[Person, str] | None:
    """Whose session this is, and its CSRF token; None where it is unknown, has ended or expired, or the account is closed."""
    now, key = time.time(), _sha256(token)
    query = sa.select(people, sessions.c.seen).join(sessions, sessions.c.person == people.c.id)
    lives = (sessions.c.ended_at.is_(None), sessions.c.expires > now, sessions.c.seen > now - idle_seconds)
    with engine.connect() as connection:
        row = (
            connection.execute(query.where(sessions.c.token_sha256 == key, people.c.active, *lives)).mappings().first()
        )
    if row is None:
        return None
    if row["seen"] < now - min(_SEEN_SECONDS, idle_seconds / 4):
        try:
            with writing(engine) as connection:
                connection.execute(sessions.update().where(sessions.c.token_sha256 == key).values(seen=now))
        except UserError:  # a full disk: what is read can still be read
            pass
    return _person(row), _csrf(token)


def end_session(engine: Engine, token: str, *, address: str = "") -> None:
    """Ends a session; one that is unknown or has ended is no error."""
    lives = sa.and_(sessions.c.token_sha256 == _sha256(token), sessions.c.ended_at.is_(None))
    with writing(engine) as connection:
        person = connection.scalar(sa.select(sessions.c.person).where(lives))
        if person is not None:
            connection.execute(sessions.update().where(lives).values(ended_at=time.time()))
            note(connection, "sign_out", person, person, address)


def end_all(engine: Engine, person_id: str, *, by: str | None = None, address: str = "") -> None:
    """Ends all sessions of a person."""
    with writing(engine) as connection:
        _end_sessions(connection, person_id)
        note(connection, "sessions_ended", person_id, by, address)


def audit_log(engine: Engine, limit: int = 200, before: int | None = None) -> list[dict[str, Any]]:
    """The last lines of the audit log, the newest first; `before`: those before the line of this number."""
    query = sa.select(audit).order_by(audit.c.number.desc()).limit(limit)
    query = query if before is None else query.where(audit.c.number < before)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def check_strength(password: str, name: str) -> None:
    """Refuses a password that is guessed early.

    Raises:
      UserError: it is short, or very long, of few characters, or of the name.
    """
    length, said = len(password), unicodedata.normalize("NFKC", password).casefold()
    if not MIN_PASSWORD <= length <= MAX_PASSWORD:
        raise UserError(f"the password has {length} characters; expected {MIN_PASSWORD} to {MAX_PASSWORD}")
    rest = said
    for part in sorted({_folded(name), *_folded(name).split()}, key=len, reverse=True):
        rest = rest.replace(part, "") if len(part) >= 3 else rest
    if len(rest) < MIN_PASSWORD // 2 or len(set(rest)) < 5:
        raise UserError("the password is little more than the name, or few characters again and again; choose another")


@cache
def _hasher() -> Any:
    try:
        from argon2 import PasswordHasher
    except ImportError as error:
        raise UserError("accounts need argon2-cffi: pip install 'jaxtune[review]'") from error
    return PasswordHasher()


@cache
def _nobodys_hash() -> str:
    return str(_hasher().hash(secrets.token_urlsafe(32)))


def _hash(password: str, name: str) -> str:
    check_strength(password, name)
    return str(_hasher().hash(unicodedata.normalize("NFKC", password)))


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _csrf(token: str) -> str:
    return _sha256(f"csrf of {token}")


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _name(name: str) -> str:
    name = " ".join(unicodedata.normalize("NFKC", name).split())
    if not name or len(name) > MAX_NAME or not name.isprintable() or name.startswith(MODEL):
        raise UserError(
            f"name={name!r:.80}; expected 1 to {MAX_NAME} printable characters, not starting with {MODEL!r}"
        )
    return name


def _role(role: str) -> str:
    if role not in ROLES:
        raise UserError(f"role={role!r:.80}; expected one of {', '.join(ROLES)}")
    return role


def _skills(skills: Sequence[str]) -> tuple[str, ...]:
    for skill in skills:
        if not isinstance(skill, str) or not skill.strip() or len(skill) > 100 or not skill.isprintable():
            raise UserError(f"skill={skill!r:.80}; expected names of groups, of 1 to 100 printable characters")
    return tuple(dict.fromkeys(skill.strip() for skill in skills))


def _person(row: Any) -> Person:
    return Person(row["id"], row["name"], row["role"], tuple(row["skills"]), bool(row["active"]))


def _find(connection: sa.Connection, name: str) -> Any:
    """The row of a name; by folding in Python, for SQLite's own knows ASCII alone."""
    wanted = _folded(name[: 2 * MAX_NAME])
    ids = (row.id for row in connection.execute(sa.select(people.c.id, people.c.name)) if _folded(row.name) == wanted)
    found = next(ids, None)
    return None if found is None else _known(connection, found)


def _known(connection: sa.Connection, person_id: str) -> dict[str, Any]:
    row = connection.execute(sa.select(people).where(people.c.id == person_id)).mappings().first()
    if row is None:
        raise UserError(f"nobody has the id {person_id!r:.80}")
    return dict(row)


def _invited(connection: sa.Connection, token: str) -> Person:
    query = sa.select(people, invites.c.expires, invites.c.used_at).join(invites, invites.c.person == people.c.id)
    row = connection.execute(query.where(invites.c.token_sha256 == _sha256(token))).mappings().first()
    if row is None:
        raise UserError("this invite is unknown; check that the link is whole, or ask for a new one")
    if row["used_at"] is not None:
        raise UserError("this invite was used; ask for a new one")
    if row["expires"] <= time.time() or not row["active"]:
        raise UserError("this invite has expired; ask for a new one")
    return _person(row)


def _end_sessions(connection: sa.Connection, person_id: str, keep: str = "") -> None:
    theirs = sa.and_(
        sessions.c.person == person_id, sessions.c.ended_at.is_(None), sessions.c.token_sha256 != _sha256(keep)
    )
    connection.execute(sessions.update().where(theirs).values(ended_at=time.time()))


def _void_invites(connection: sa.Connection, person_id: str) -> None:
    now = time.time()
    open_ones = sa.and_(invites.c.person == person_id, invites.c.used_at.is_(None), invites.c.expires > now)
    connection.execute(invites.update().where(open_ones).values(expires=now))


def _one_at_a_time(connection: sa.Connection) -> None:
    """Two who make or change accounts at once take turns; on SQLite writers do anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(7423)"))
