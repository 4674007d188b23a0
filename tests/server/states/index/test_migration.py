"""Tables of an earlier version become those of today, with all that is in them; those of a later one are left alone."""

import sqlite3
from pathlib import Path

import pytest

from server.states.errors import StoreError, StoreUnavailableError
from tests.server.states.index.tables_of_version_1 import RESPONSES, ROWS, in_postgresql
from tests.server.states.stores import EmbeddedKind, Kind, SharedKind, make

pytestmark = pytest.mark.anyio
SQLITE_1 = """
CREATE TABLE snapshots (
    file TEXT PRIMARY KEY, position INTEGER NOT NULL, pending TEXT NOT NULL, last_token INTEGER NOT NULL,
    turn TEXT NOT NULL, num_bytes INTEGER NOT NULL, fingerprint TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE states (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, name TEXT, parent TEXT,
    created REAL NOT NULL, used REAL NOT NULL, ttl_s REAL, head TEXT NOT NULL REFERENCES snapshots (file),
    UNIQUE (owner, name)
) STRICT;
CREATE TABLE points (
    state TEXT NOT NULL REFERENCES states (id) ON DELETE CASCADE, name TEXT NOT NULL, created REAL NOT NULL,
    snapshot TEXT NOT NULL REFERENCES snapshots (file), PRIMARY KEY (state, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL, ttl_s REAL,
    body TEXT NOT NULL, input_items TEXT NOT NULL, snapshot TEXT REFERENCES snapshots (file)
) STRICT, WITHOUT ROWID;
CREATE INDEX states_by_head ON states (head);
CREATE INDEX points_by_snapshot ON points (snapshot);
CREATE INDEX responses_by_snapshot ON responses (snapshot);
PRAGMA user_version = 1;
"""
FILES = ("one", "two", "three")


@pytest.fixture
def embedded(tmp_path: Path) -> EmbeddedKind:
    (tmp_path / "files").mkdir()
    for file in FILES:
        (tmp_path / "files" / file).write_bytes(file[:3].encode())
    connection = sqlite3.connect(tmp_path / "states.db")
    connection.executescript(SQLITE_1 + ROWS + RESPONSES.format(columns="", ended="", waiting="", made=""))
    connection.close()
    return EmbeddedKind(tmp_path)


@pytest.fixture
def shared(shared_kind: SharedKind) -> SharedKind:
    shared_kind.ask(in_postgresql(shared_kind.schema))
    return shared_kind


@pytest.mark.parametrize("name", ["embedded", "shared"])
async def test_what_an_earlier_version_has_kept_is_there(name: str, request: pytest.FixtureRequest) -> None:
    kind: Kind = request.getfixturevalue(name)
    store = kind.open()
    state = await store.get("ann", "state_1")
    assert (state.name, state.head.file, [point.snapshot.file for point in state.points]) == ("talk", "one", ["two"])
    async with store.hold(state.head) as path:
        assert path.read_bytes() == b"one"
    ended = await store.get_response("bob", "r1")
    assert (ended.has_ended, ended.snapshot is not None) == (True, True)
    assert [response.id for response in await store.claim_responses(9, fingerprint="dj")] == ["r2"]
    await make(store, name="new")
    await store.delete("ann", "state_1")
    await store.delete_response("bob", "r1")
    assert kind.num_files() == 1
    await store.close()
    again = kind.open()
    assert len(await again.list_states("ann", limit=9, after=None, name=None)) == 1
    await again.close()


async def test_a_later_version_is_left_alone(shared_kind: SharedKind, tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = (EmbeddedKind(tmp_path / "one"), shared_kind)
    for kind in kinds:
        await kind.open().close()
    connection = sqlite3.connect(tmp_path / "one" / "states.db")
    with connection:
        connection.execute("UPDATE version SET number = 99")
    connection.close()
    shared_kind.ask("UPDATE {}.version SET number = 99")
    for kind in kinds:
        with pytest.raises(StoreError, match="has states of version 99, this program writes version 3"):
            kind.open()


async def test_a_server_writes_no_more_when_a_later_version_has_taken_over(shared_kind: SharedKind) -> None:
    store = shared_kind.open()
    state = await make(store)
    shared_kind.ask("UPDATE {}.version SET number = 4")
    for call in (make(store), store.delete("ann", state.id), store.heartbeat()):
        with pytest.raises(StoreUnavailableError):
            await call
    assert not store.totals.is_up
    assert shared_kind.num_files() == 1
    shared_kind.ask("UPDATE {}.version SET number = 3")
    await store.close()
