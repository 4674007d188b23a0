"""What the first version of the store has kept: three snapshots, a state with a point, three responses."""

_POSTGRES = """
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


def in_postgresql(schema: str) -> str:
    """Statements that make a schema with all of it, and the content of each snapshot."""
    responses = RESPONSES.format(
        columns="(id, owner, created, used, ttl_s, body, input_items, snapshot, maker)",
        ended=", NULL",
        waiting=", ''",
        made=", 'gone'",
    )
    chunks = "INSERT INTO chunks SELECT file, 0, convert_to(left(file, 3), 'UTF8') FROM snapshots;"
    begin = f"CREATE SCHEMA {schema}; SET search_path TO {schema};"
    return f"{begin} {_POSTGRES} {ROWS} INSERT INTO replicas VALUES ('gone', 0); {responses} {chunks}"
