"""The tables of the shared store, and how they are made."""

import psycopg
from psycopg import sql

from server.states.errors import StoreError
from server.states.postgres.connections import Transaction

SCHEMA_VERSION = 1
CHUNK_BYTES = 1 << 20
TABLES = (
    "CREATE TABLE version (number INTEGER NOT NULL)",
    # Servers that use the store. `beat`: when one was heard last.
    'CREATE TABLE replicas (id TEXT COLLATE "C" PRIMARY KEY, beat DOUBLE PRECISION NOT NULL)',
    'CREATE TABLE snapshots (file TEXT COLLATE "C" PRIMARY KEY, position BIGINT NOT NULL, pending TEXT NOT NULL, '
    "last_token BIGINT NOT NULL, turn TEXT NOT NULL, num_bytes BIGINT NOT NULL, fingerprint TEXT NOT NULL)",
    # A snapshot's content, in order. Not compressed: the numbers of a state do not shrink.
    'CREATE TABLE chunks (file TEXT COLLATE "C" NOT NULL REFERENCES snapshots (file) ON DELETE CASCADE, '
    "number INTEGER NOT NULL, data BYTEA NOT NULL, PRIMARY KEY (file, number))",
    "ALTER TABLE chunks ALTER COLUMN data SET STORAGE EXTERNAL",
    # Files that a server is writing (with the room kept for them), or just reading (with none).
    'CREATE TABLE uses (file TEXT COLLATE "C" NOT NULL, replica TEXT COLLATE "C" NOT NULL '
    "REFERENCES replicas (id) ON DELETE CASCADE, num_bytes BIGINT NOT NULL, PRIMARY KEY (file, replica))",
    'CREATE TABLE states (number BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE, id TEXT COLLATE "C" PRIMARY KEY, '
    'owner TEXT COLLATE "C" NOT NULL, name TEXT COLLATE "C", parent TEXT, created DOUBLE PRECISION NOT NULL, '
    "used DOUBLE PRECISION NOT NULL, ttl_s DOUBLE PRECISION, head TEXT NOT NULL REFERENCES snapshots (file), "
    "UNIQUE (owner, name))",
    "CREATE TABLE points (state TEXT NOT NULL REFERENCES states (id) ON DELETE CASCADE, "
    'name TEXT COLLATE "C" NOT NULL, '
    "created DOUBLE PRECISION NOT NULL, snapshot TEXT NOT NULL REFERENCES snapshots (file), PRIMARY KEY (state, name))",
    # `maker`: the server that makes a response; null: it has ended; empty: it was put off, and any may take it up.
    'CREATE TABLE responses (id TEXT COLLATE "C" PRIMARY KEY, owner TEXT COLLATE "C" NOT NULL, '
    "created DOUBLE PRECISION NOT NULL, used DOUBLE PRECISION NOT NULL, ttl_s DOUBLE PRECISION, body TEXT NOT NULL, "
    "input_items TEXT NOT NULL, snapshot TEXT REFERENCES snapshots (file), maker TEXT)",
    "CREATE INDEX ON states (owner, number)",
    "CREATE INDEX ON states (head)",
    "CREATE INDEX ON states (used)",
    "CREATE INDEX ON states ((used + ttl_s))",
    "CREATE INDEX ON points (snapshot)",
    "CREATE INDEX ON responses (snapshot)",
    "CREATE INDEX ON responses (used)",
    "CREATE INDEX ON responses ((used + ttl_s))",
    "CREATE INDEX ON responses (maker) WHERE maker IS NOT NULL",
)


def ensure_tables(transaction: Transaction, schema: str) -> None:
    """Makes what is not there yet.

    Raises:
        StoreError: the tables are another version's, or may not be made.
    """
    try:
        if transaction.row("SELECT 1 FROM pg_namespace WHERE nspname = %s", schema) is None:
            transaction.cursor.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        if transaction.row("SELECT to_regclass('version') AS name WHERE to_regclass('version') IS NOT NULL") is None:
            for statement in TABLES:
                transaction.run(statement)
            transaction.run("INSERT INTO version VALUES (%s)", SCHEMA_VERSION)
    except psycopg.errors.InsufficientPrivilege as error:
        raise StoreError(f"the tables of states cannot be made in the schema {schema}: {error}") from error
    version = transaction.number("SELECT number FROM version")
    if version != SCHEMA_VERSION:
        raise StoreError(f"the schema {schema} has states of version {version}, this program writes {SCHEMA_VERSION}")
