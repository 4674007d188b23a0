"""The files of a shared store whose content is in an object store, while the index stays in PostgreSQL.

An object is noted in the index before it is written, and until it is removed: whatever happens in between, what is
noted and neither a snapshot nor in use is removed by the next server that looks. Files that were kept in PostgreSQL
before are read there.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from server.states.files.bucket import Bucket
from server.states.files.contents import SharedFiles
from server.states.index.database import AMONG
from server.states.index.postgres import Postgres
from server.states.index.rows import insert_snapshot
from server.states.store import SnapshotRecord

MAX_REMOVED = 200
"""Objects that are removed at a time."""
_LEFT_OVER = (
    "SELECT file FROM objects AS o WHERE NOT EXISTS (SELECT 1 FROM snapshots WHERE snapshots.file = o.file) "
    "AND NOT EXISTS (SELECT 1 FROM uses WHERE uses.file = o.file) LIMIT %s"
)


class ObjectFiles(SharedFiles):
    """`SnapshotFiles` in an object store."""

    def __init__(self, parent: Path, *, max_bytes: int, database: Postgres, replica_name: str, bucket: Bucket) -> None:
        """See `SharedFiles`."""
        super().__init__(parent, max_bytes=max_bytes, database=database, replica_name=replica_name)
        self._bucket = bucket

    def upload(self, snapshot: SnapshotRecord, *, owner: str) -> None:
        """See `SnapshotFiles.upload`."""
        with self._database.adding() as transaction:
            transaction.run("INSERT INTO objects VALUES (%s) ON CONFLICT DO NOTHING", snapshot.file)
            self._require_room(transaction, snapshot.file)
        self._bucket.put(snapshot.file, self.path(snapshot.file))
        with self._database.adding() as transaction:
            if insert_snapshot(transaction, snapshot, owner=owner, held_by=self._replica_name):
                self._require_room(transaction, snapshot.file)

    def content(self, snapshot: SnapshotRecord) -> Iterator[bytes]:
        """See `SharedFiles.content`."""
        with self._database.reading() as transaction:
            is_object = transaction.row("SELECT 1 FROM objects WHERE file = %s", snapshot.file) is not None
        return self._bucket.get(snapshot.file) if is_object else super().content(snapshot)

    def tidy(self) -> None:
        """See `SnapshotFiles.tidy`."""
        with self._database.reading() as transaction:
            files = [row["file"] for row in transaction.rows(_LEFT_OVER, MAX_REMOVED)]
        for file in files:
            self._bucket.delete(file)
        if files:
            with self._database.adding() as transaction:
                transaction.run(f"DELETE FROM objects WHERE file {AMONG}", json.dumps(files))  # noqa: S608
