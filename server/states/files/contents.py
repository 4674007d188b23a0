"""The files of a shared store: their content is in PostgreSQL, beside the index, and working copies are here."""

from collections.abc import Iterator
from pathlib import Path

from server.engine.state.snapshot_files import write_file
from server.states.errors import StoreUnavailableError, snapshot_gone
from server.states.files.copies import WorkingCopies
from server.states.index.database import Transaction
from server.states.index.postgres import Postgres
from server.states.index.rows import insert_snapshot
from server.states.index.schema import CHUNK_BYTES
from server.states.store import SnapshotRecord


class SharedFiles(WorkingCopies):
    """`SnapshotFiles` in PostgreSQL."""

    def __init__(self, parent: Path, *, max_bytes: int, database: Postgres, replica_name: str) -> None:
        """See `WorkingCopies`; `replica_name`: noted with what this server writes."""
        super().__init__(parent, max_bytes=max_bytes)
        self._database = database
        self._replica_name = replica_name

    def upload(self, snapshot: SnapshotRecord, *, owner: str) -> None:
        """See `SnapshotFiles.upload`."""
        with self.path(snapshot.file).open("rb") as file, self._database.adding() as transaction:
            if not insert_snapshot(transaction, snapshot, owner=owner, held_by=self._replica_name):
                return
            with transaction.cursor.copy("COPY chunks (file, number, data) FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["text", "int4", "bytea"])
                number = 0
                while chunk := file.read(CHUNK_BYTES):
                    copy.write_row((snapshot.file, number, chunk))
                    number += 1
            self._require_room(transaction, snapshot.file)

    def _require_room(self, transaction: Transaction, file: str) -> None:
        """Whoever gives up the room removes what is in it: after this transaction, or this is not to be."""
        kept = "SELECT 1 FROM uses WHERE file = %s AND replica = %s FOR SHARE"
        if transaction.row(kept, file, self.replica) is None:
            raise StoreUnavailableError

    def download(self, snapshot: SnapshotRecord) -> None:
        """See `SnapshotFiles.download`."""
        write_file(self.path(snapshot.file), self.content(snapshot))

    def content(self, snapshot: SnapshotRecord) -> Iterator[bytes]:
        """A snapshot's file in pieces, as of one moment; raises `NotFoundError` before the first."""
        with self._database.reading() as transaction:
            number = num_bytes = 0
            statement = b"SELECT data FROM chunks WHERE file = %s AND number = %s"
            while num_bytes < snapshot.num_bytes:
                row = transaction.cursor.execute(statement, (snapshot.file, number), binary=True).fetchone()
                if row is None:
                    raise snapshot_gone()
                yield row["data"]
                number, num_bytes = number + 1, num_bytes + len(row["data"])
