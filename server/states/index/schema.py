"""The tables of the index, how they are made, and how those of an earlier version become those of today."""

from collections.abc import Collection, Mapping

from server.states.errors import StoreError
from server.states.index.database import Database, Transaction

SCHEMA_VERSION = 3
CHUNK_BYTES = 1 << 20
_TABLES = {
    "version": "CREATE TABLE version (number INTEGER NOT NULL)",
    # Servers that use the index. `beat`: when one was heard last.
    "replicas": "CREATE TABLE replicas (id {text} PRIMARY KEY, beat {real} NOT NULL)",
    # `owner`: whose budget pays for it. `held_by`: name of the server that wrote it.
    "snapshots": "CREATE TABLE snapshots (file {text} PRIMARY KEY, position {integer} NOT NULL, pending TEXT NOT NULL, "
    "last_token {integer} NOT NULL, turn TEXT NOT NULL, num_bytes {integer} NOT NULL, fingerprint TEXT NOT NULL, "
    "owner {text} NOT NULL, held_by TEXT NOT NULL)",
    # Files that a server is writing (with the room kept for them), or just reading (with none).
    "uses": "CREATE TABLE uses (file {text} NOT NULL, "
    "replica {text} NOT NULL REFERENCES replicas (id) ON DELETE CASCADE, "
    "num_bytes {integer} NOT NULL, owner {text} NOT NULL, PRIMARY KEY (file, replica))",
    "states": "CREATE TABLE states (number {number}, id {text} NOT NULL UNIQUE, owner {text} NOT NULL, name {text}, "
    "parent TEXT, created {real} NOT NULL, used {real} NOT NULL, ttl_s {real}, "
    "head {text} NOT NULL REFERENCES snapshots (file), UNIQUE (owner, name))",
    "points": "CREATE TABLE points (state {text} NOT NULL REFERENCES states (id) ON DELETE CASCADE, "
    "name {text} NOT NULL, created {real} NOT NULL, snapshot {text} NOT NULL REFERENCES snapshots (file), "
    "PRIMARY KEY (state, name))",
    # `maker`: the server that makes a response; null: it has ended; empty: it was suspended, and any may claim it.
    # `text_bytes`: of body and input_items. `claims`: how often a server has taken it up. `fingerprint`: of the model
    # that may; empty: any.
    "responses": "CREATE TABLE responses (id {text} PRIMARY KEY, owner {text} NOT NULL, created {real} NOT NULL, "
    "used {real} NOT NULL, ttl_s {real}, body TEXT NOT NULL, input_items TEXT NOT NULL, "
    "snapshot {text} REFERENCES snapshots (file), maker TEXT, text_bytes {integer} NOT NULL, "
    "claims {integer} NOT NULL, fingerprint TEXT NOT NULL)",
}
_INDEXES = (
    "CREATE INDEX states_of_owner ON states (owner, number)",
    "CREATE INDEX states_by_head ON states (head)",
    "CREATE INDEX states_by_use ON states (used)",
    "CREATE INDEX states_by_end ON states ((used + ttl_s))",
    "CREATE INDEX points_by_snapshot ON points (snapshot)",
    "CREATE INDEX responses_of_owner ON responses (owner)",
    "CREATE INDEX responses_by_snapshot ON responses (snapshot)",
    "CREATE INDEX responses_by_use ON responses (used)",
    "CREATE INDEX responses_by_end ON responses ((used + ttl_s))",
    "CREATE INDEX responses_by_maker ON responses (maker) WHERE maker IS NOT NULL",
    "CREATE INDEX snapshots_of_owner ON snapshots (owner)",
)
# Files whose content is in an object store, from before it is written until it is removed.
_OBJECTS = 'CREATE TABLE objects (file TEXT COLLATE "C" PRIMARY KEY)'
_HELD_BY = "ALTER TABLE snapshots ADD COLUMN held_by TEXT NOT NULL DEFAULT ''"
_CONTENTS = (
    # A snapshot's content, in order. Not compressed: the numbers of a state do not shrink.
    'CREATE TABLE chunks (file TEXT COLLATE "C" NOT NULL REFERENCES snapshots (file) ON DELETE CASCADE, '
    "number INTEGER NOT NULL, data BYTEA NOT NULL, PRIMARY KEY (file, number))",
    "ALTER TABLE chunks ALTER COLUMN data SET STORAGE EXTERNAL",
    _OBJECTS,
)
_POSTGRES = {
    "text": 'TEXT COLLATE "C"',
    "integer": "BIGINT",
    "real": "DOUBLE PRECISION",
    "number": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
}
_SQLITE = {"text": "TEXT", "integer": "INTEGER", "real": "REAL", "number": "INTEGER PRIMARY KEY"}
POSTGRES_TABLES = (*(table.format(**_POSTGRES) for table in _TABLES.values()), *_CONTENTS, *_INDEXES)
_IN_SQLITE = {name: f"{table.format(**_SQLITE)} STRICT" for name, table in _TABLES.items()}
SQLITE_TABLES = (*_IN_SQLITE.values(), *_INDEXES)
_OWNER_OF_SNAPSHOT = (
    "UPDATE snapshots SET owner = coalesce((SELECT min(owner) FROM states WHERE head = file), "
    "(SELECT min(states.owner) FROM points JOIN states ON states.id = points.state WHERE points.snapshot = file), "
    "(SELECT min(owner) FROM responses WHERE snapshot = file), '')"
)
POSTGRES_MIGRATIONS: Mapping[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE snapshots ADD COLUMN owner TEXT COLLATE \"C\" NOT NULL DEFAULT ''",
        "ALTER TABLE uses ADD COLUMN owner TEXT COLLATE \"C\" NOT NULL DEFAULT ''",
        "ALTER TABLE responses ADD COLUMN text_bytes BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE responses ADD COLUMN claims BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE responses ADD COLUMN fingerprint TEXT NOT NULL DEFAULT ''",
        "UPDATE responses SET text_bytes = octet_length(body) + octet_length(input_items)",
        _OWNER_OF_SNAPSHOT,
        "CREATE INDEX responses_of_owner ON responses (owner)",
        "CREATE INDEX snapshots_of_owner ON snapshots (owner)",
    ),
    2: (_HELD_BY, _OBJECTS),
}
SQLITE_MIGRATIONS: Mapping[int, tuple[str, ...]] = {
    1: (
        *(_IN_SQLITE[name] for name in ("version", "replicas", "uses")),
        "INSERT INTO version VALUES (1)",
        "ALTER TABLE snapshots ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE responses ADD COLUMN maker TEXT",
        "ALTER TABLE responses ADD COLUMN text_bytes INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE responses ADD COLUMN claims INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE responses ADD COLUMN fingerprint TEXT NOT NULL DEFAULT ''",
        "UPDATE responses SET text_bytes = length(CAST(body AS BLOB)) + length(CAST(input_items AS BLOB))",
        "UPDATE responses SET maker = '' WHERE json_extract(body, '$.status') = 'queued'",
        "UPDATE responses SET maker = 'gone' WHERE json_extract(body, '$.status') = 'in_progress'",
        _OWNER_OF_SNAPSHOT,
        *(index for index in _INDEXES if "_by_head" not in index and "_by_snapshot" not in index),
    ),
    2: (_HELD_BY,),
}


def ensure_tables(database: Database, transaction: Transaction) -> int | None:
    """Makes what is not there yet, and today's tables of earlier ones.

    Returns:
        The version that was there; None: there was none.

    Raises:
        StoreError: the tables are a later version's.
    """
    found = database.version(transaction)
    if found is None:
        _run(transaction, database.tables)
        transaction.run("INSERT INTO version VALUES (%s)", SCHEMA_VERSION)
        return None
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"the index has states of version {found}, this program writes version {SCHEMA_VERSION}: a later version "
            "of the program has made it"
        )
    for version in range(found, SCHEMA_VERSION):
        _run(transaction, database.migration(version))
        transaction.run("UPDATE version SET number = %s", version + 1)
    return found


def _run(transaction: Transaction, statements: Collection[str]) -> None:
    for statement in statements:
        transaction.run(statement)
