"""The processes of the ranks beside this one: started, told, watched.

When one of them ends, this process ends too, at once: its main thread may be waiting for that rank for ever. The
service then starts a new engine, as after every death of an engine, and the other ranks end with this process.
"""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from dijiang_model.errors import ModelError
from server.engine.failures import log_failure
from server.engine.tensor_parallel.channel import Plan, RankFailed, StartRank, encode, next_answer
from server.engine.types.requests import EngineConfig

EXIT_RANK_DIED = 72
_MODULE = "server.engine.tensor_parallel.worker"
_PATIENCE_S = 5.0


class RankDiedError(RuntimeError):
    """The process of a rank has ended; another try may help."""


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    connection: "Connection[bytes, bytes]"


class Ranks:
    """Ranks 1 to N - 1."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts their processes, which load the model at once.

        Raises:
            OSError: no process can be started.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="dijiang-ranks-", dir=config.scratch_folder))  # mode 0700
        # A step may fail for want of a rank before its death is noticed.
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self._is_closing = threading.Event()
        self._ranks: list[_Rank] = []
        try:
            for number in range(1, config.tensor_parallel):
                self._ranks.append(_start(number))
                self._ranks[-1].connection.send_bytes(encode(StartRank(config, number, str(self.folder))))
        except BaseException:
            self.close()
            raise

    @property
    def meeting_point(self) -> Path:
        """The file over which the ranks find each other."""
        return meeting_point(self.folder)

    def tell(self, plan: Plan) -> None:
        """Hands every rank the next plan; waits only for one that is megabytes behind."""
        message = encode(plan)
        for rank in self._ranks:
            rank.connection.send_bytes(message)

    def wait_loaded(self) -> None:
        """Returns when all have loaded their part.

        Raises:
            ModelError: one cannot, and never will.
            RankDiedError: one cannot now.
        """
        for rank in self._ranks:
            try:
                answer = next_answer(rank.connection)
            except (EOFError, OSError):
                status = rank.process.wait()
                raise RankDiedError(f"rank {rank.number} ended with status {status} while it loaded") from None
            if isinstance(answer, RankFailed):
                kind = ModelError if answer.is_permanent else RankDiedError
                raise kind(f"rank {rank.number} cannot load its part: {answer.reason}")

    def watch(self) -> None:
        """From now on the end of any rank ends this process."""
        for rank in self._ranks:
            threading.Thread(target=self._end_with, args=(rank,), daemon=True).start()

    def close(self) -> None:
        """Ends all of them."""
        self._is_closing.set()
        for rank in self._ranks:
            rank.connection.close()
            if rank.process.stdin is not None:
                rank.process.stdin.close()
        for rank in self._ranks:
            try:
                rank.process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_with(self, rank: _Rank) -> None:
        status = rank.process.wait()
        if not self._is_closing.is_set():
            log_failure("engine_rank_died", RankDiedError(f"rank {rank.number} ended with status {status}"))
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(EXIT_RANK_DIED)


def meeting_point(folder: Path) -> Path:
    """The file in the ranks' folder over which they find each other."""
    return folder / "meeting"


def _start(number: int) -> _Rank:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 (this program)
            [sys.executable, "-m", _MODULE, str(theirs.fileno())], stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]
        )
    return _Rank(number, process, Connection(ours.detach()))
