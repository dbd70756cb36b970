"""Accounts, invites, sessions: who gets in, who does not, and what the database keeps of their secrets."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from jaxtune.review import people, store
from jaxtune.types import UserError

GOOD = "correct horse battery"


@pytest.fixture
def db(url: str):
    with store.opened(url) as engine:
        yield engine


def test_password_lets_in_and_only_it(db) -> None:
    anna = people.add(db, "Anna Maier", "senior", ("legal",), GOOD)
    assert people.check_password(db, "anna  MAIER", GOOD) == anna
    assert people.check_password(db, "Anna Maier", GOOD + "!") is None
    assert people.check_password(db, "nobody", GOOD) is None
    actions = [line["action"] for line in people.audit_log(db)]
    assert actions == ["sign_in_failed", "sign_in_failed", "sign_in", "person"]


def test_account_without_a_password_is_not_entered_by_one(db) -> None:
    people.add(db, "Ben", "expert")
    for guess in ("", GOOD):
        assert people.check_password(db, "Ben", guess) is None


@pytest.mark.parametrize("password", ["short", "a" * 20, "Ben Ben Ben Ben", "bensonbenson", "x" * 2000])
def test_weak_password_is_refused(tmp_path: Path, password: str) -> None:
    with store.opened(str(tmp_path / "a.db")) as db, pytest.raises(UserError, match="password"):
        people.add(db, "Ben Benson", "expert", password=password)


def test_names_differ_by_more_than_case(db) -> None:
    people.add(db, "Ümit", "expert")
    with pytest.raises(UserError, match="choose another name"):
        people.add(db, "ÜMIT", "expert")
    for wrong in ("", " ", "a\x00b", "a" * 201, "a\u202eb"):
        with pytest.raises(UserError, match="name="):
            people.add(db, wrong, "expert")


def test_one_name_at_once_is_made_once(db) -> None:
    made, refused = [], []

    def make() -> None:
        try:
            made.append(people.add(db, "Cleo", "expert"))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(made) == 1
    assert len(refused) == 7


def test_invite_is_used_once_even_at_once(db) -> None:
    dora = people.add(db, "Dora", "expert")
    token = people.invite(db, dora.id)
    with pytest.raises(UserError, match="12 to"):
        people.accept_invite(db, token, "short")  # which leaves the invite as it was
    assert people.invited(db, token) == dora
    entered, refused = [], []

    def enter() -> None:
        try:
            entered.append(people.accept_invite(db, token, GOOD))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert entered == [dora]
    assert len(refused) == 5
    assert all("was used" in why for why in refused)
    assert people.check_password(db, "Dora", GOOD) == dora


def test_invites_that_do_not_hold(db) -> None:
    emil = people.add(db, "Emil", "expert")
    first, second = people.invite(db, emil.id), people.invite(db, emil.id)
    with pytest.raises(UserError, match="expired"):
        people.accept_invite(db, first, None)  # the second took its place
    with pytest.raises(UserError, match="unknown"):
        people.accept_invite(db, "x" * 43, None)
    assert people.accept_invite(db, second, None) == emil
    late = people.invite(db, emil.id, valid_seconds=-1.0)
    with pytest.raises(UserError, match="expired"):
        people.accept_invite(db, late, None)
    third = people.invite(db, emil.id)
    people.change(db, emil.id, active=False)
    with pytest.raises(UserError, match="expired"):
        people.accept_invite(db, third, None)
    with pytest.raises(UserError, match="closed"):
        people.invite(db, emil.id)


def test_session_ends(db) -> None:
    fay = people.add(db, "Fay", "expert", password=GOOD)
    token, csrf = people.start_session(db, fay, 3600.0)
    assert people.session(db, token) == (fay, csrf)
    assert people.session(db, csrf) is None
    assert people.session(db, token + "a") is None
    people.end_session(db, token)
    people.end_session(db, token)
    assert people.session(db, token) is None
    expired, _ = people.start_session(db, fay, -1.0)
    assert people.session(db, expired) is None
    idle, _ = people.start_session(db, fay, 3600.0)
    time.sleep(0.06)
    assert people.session(db, idle, idle_seconds=0.05) is None
    assert people.session(db, idle) is not None


def test_requests_keep_a_session_from_being_idle(db) -> None:
    fay = people.add(db, "Fay", "expert", password=GOOD)
    token, _ = people.start_session(db, fay, 3600.0)
    for _ in range(6):
        time.sleep(0.1)
        assert people.session(db, token, idle_seconds=0.4) is not None


def test_what_ends_the_sessions_of_others(db) -> None:
    owner = people.add(db, "Owner", "owner")
    gil = people.add(db, "Gil", "expert", password=GOOD)
    mine, stolen = (people.start_session(db, gil)[0] for _ in range(2))
    people.set_password(db, gil.id, "another good one", keep=mine)
    assert people.session(db, stolen) is None
    assert people.session(db, mine) is not None
    people.change(db, gil.id, role="senior", by=owner.id)
    assert people.session(db, mine)[0].role == "senior"  # at once, not at the next sign-in
    people.end_all(db, gil.id)
    assert people.session(db, mine) is None
    again, _ = people.start_session(db, gil)
    people.change(db, gil.id, active=False)
    assert people.session(db, again) is None
    assert people.check_password(db, "Gil", "another good one") is None


def test_last_owner_stays(db) -> None:
    one = people.add(db, "One", "owner")
    for wrong in ({"role": "senior"}, {"active": False}):
        with pytest.raises(UserError, match="only owner"):
            people.change(db, one.id, **wrong)
    two = people.add(db, "Two", "owner")
    people.change(db, one.id, role="expert")
    assert [person.role for person in people.everyone(db)] == ["expert", "owner"]
    assert people.may(two, "expert")
    assert not people.may(one._replace(role="expert"), "senior")


def test_no_secret_is_in_the_database(db) -> None:
    hal = people.add(db, "Hal", "expert", password=GOOD)
    secrets = [GOOD, people.invite(db, hal.id), *people.start_session(db, hal)]
    people.check_password(db, "typed the passw0rd here", "x")
    kept = ""
    with db.connect() as connection:
        for table in store._META.sorted_tables:
            kept += "".join(str(tuple(row)) for row in connection.execute(sa.select(table)))
    assert "$argon2id$" in kept
    for secret in (*secrets, "passw0rd"):
        assert secret not in kept


def test_hash_of_weaker_settings_is_made_anew(db) -> None:
    from argon2 import PasswordHasher

    ida = people.add(db, "Ida", "expert", password=GOOD)
    weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(GOOD)
    with store.writing(db) as connection:
        connection.execute(store.people.update().values(password_hash=weak))
    assert people.check_password(db, "Ida", GOOD) == ida
    with db.connect() as connection:
        kept = connection.scalar(sa.select(store.people.c.password_hash))
    assert kept != weak
    assert not PasswordHasher().check_needs_rehash(kept)
    assert people.check_password(db, "Ida", GOOD) == ida


def test_an_unknown_name_costs_the_work_of_a_wrong_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures how long a sign-in takes must not learn who has an account: one hash is verified in either case."""
    verified = []
    real = people._hasher()

    class Counting:
        def hash(self, password: str) -> str:
            return real.hash(password)

        def verify(self, kept: str, password: str) -> bool:
            verified.append(kept)
            return real.verify(kept, password)

        def check_needs_rehash(self, kept: str) -> bool:
            return real.check_needs_rehash(kept)

    monkeypatch.setattr(people, "_hasher", Counting)
    with store.opened(str(tmp_path / "a.db")) as db:
        people.add(db, "Jo", "expert", password=GOOD)
        for name in ("Jo", "Zoe"):
            assert people.check_password(db, name, "wrong wrong wrong") is None
    assert len(verified) == 2
    assert verified[0].rsplit("$", 2)[0] == verified[1].rsplit("$", 2)[0]  # the same settings: memory, passes, lanes
