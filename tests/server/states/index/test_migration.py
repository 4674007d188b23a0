"""Tables of an earlier version become those of today, with all that is in them; those of a later one are left alone."""

import sqlite3
from pathlib import Path

import pytest

from server.states.errors import StoreError, StoreUnavailableError
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
POSTGRES_1 = """
CREATE TABLE version (number INTEGER NOT NULL); INSERT INTO version VALUES (1);
CREATE TABLE replicas (id TEXT COLLATE "C" PRIMARY KEY, beat DOUBLE PRECISION NOT NULL);
CREATE TABLE snapshots (file TEXT COLLATE "C" PRIMARY KEY, position BIGINT NOT NULL, pending TEXT NOT NULL,
    last_token BIGINT NOT NULL, turn TEXT NOT NULL, num_bytes BIGINT NOT NULL, fingerprint TEXT NOT NULL);
CREATE TABLE chunks (file TEXT COLLATE "C" NOT NULL REFERENCES snapshots (file) ON DELETE CASCADE,
    number INTEGER NOT NULL, data BYTEA NOT NULL, PRIMARY KEY (file, number));
CREATE TABLE uses (file TEXT COLLATE "C" NOT NULL, replica TEXT COLLATE "C" NOT NULL
    REFERENCES replicas (id) ON DELETE CASCADE, num_bytes BIGINT NOT NULL, PRIMARY KEY (file, replica));
CREATE TABLE states (number BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE, id TEXT COLLATE "C" PRIMARY KEY,
    owner TEXT COLLATE "C" NOT NULL, name TEXT COLLATE "C", parent TEXT, created DOUBLE PRECISION NOT NULL,
    used DOUBLE PRECISION NOT NULL, ttl_s DOUBLE PRECISION, head TEXT NOT NULL REFERENCES snapshots (file),
    UNIQUE (owner, name));
CREATE TABLE points (state TEXT NOT NULL REFERENCES states (id) ON DELETE CASCADE, name TEXT COLLATE "C" NOT NULL,
    created DOUBLE PRECISION NOT NULL, snapshot TEXT NOT NULL REFERENCES snapshots (file), PRIMARY KEY (state, name));
CREATE TABLE responses (id TEXT COLLATE "C" PRIMARY KEY, owner TEXT COLLATE "C" NOT NULL,
    created DOUBLE PRECISION NOT NULL, used DOUBLE PRECISION NOT NULL, ttl_s DOUBLE PRECISION, body TEXT NOT NULL,
    input_items TEXT NOT NULL, snapshot TEXT REFERENCES snapshots (file), maker TEXT);
CREATE INDEX ON states (head);
"""
ROWS = """
INSERT INTO snapshots VALUES ('one', 5, '[7]', 7, 'open', 3, 'dj'), ('two', 6, '[]', 8, 'text', 3, 'dj'),
    ('three', 7, '[]', 9, 'text', 3, 'dj');
INSERT INTO states (id, owner, name, parent, created, used, ttl_s, head)
    VALUES ('state_1', 'ann', 'talk', NULL, 10, 20, NULL, 'one');
INSERT INTO points VALUES ('state_1', 'before', 11, 'two');
"""
RESPONSES = """
INSERT INTO responses {columns} VALUES
    ('r1', 'bob', 1, 2, NULL, '{{"status": "completed"}}', '[]', 'three'{ended}),
    ('r2', 'bob', 3, 4, NULL, '{{"status": "queued"}}', '[]', NULL{waiting}),
    ('r3', 'bob', 5, 6, NULL, '{{"status": "in_progress"}}', '[]', NULL{made});
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
    responses = RESPONSES.format(
        columns="(id, owner, created, used, ttl_s, body, input_items, snapshot, maker)",
        ended=", NULL",
        waiting=", ''",
        made=", 'gone'",
    )
    chunks = "INSERT INTO chunks SELECT file, 0, convert_to(left(file, 3), 'UTF8') FROM snapshots;"
    schema = f"CREATE SCHEMA {shared_kind.schema}; SET search_path TO {shared_kind.schema};"
    responses = f"INSERT INTO replicas VALUES ('gone', 0); {responses}"
    shared_kind.ask(f"{schema} {POSTGRES_1} {ROWS} {responses} {chunks}".replace("{}", ""))
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
