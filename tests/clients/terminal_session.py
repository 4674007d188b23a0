"""A program at a pseudo-terminal, typed at and read like a person would."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tests.waiting import PATIENCE_S

CTRL_C = "\x03"
CTRL_D = "\x04"
_ESCAPE_SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

# Only the controlling terminal of a session turns a typed Ctrl-C into a signal, which a program that was started in a
# shell's background (tests under nohup, say) inherits as ignored.
_PROGRAM = """\
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from server.cli import main
main()
"""


class TerminalSession:
    """The terminal's outside.

    Attributes:
        raw: everything that has appeared, with its colours.
    """

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._seen = ""
        self.raw = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def read_until(self, text: str, patience_s: float = PATIENCE_S) -> str:
        """What appeared since the last call, up to and including `text`, without colours."""
        deadline = time.monotonic() + patience_s
        while text not in self._seen:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {text!r} in {self._seen!r}")
            self._seen += self._read()
        shown, _, self._seen = self._seen.partition(text)
        return shown + text

    def interrupt_until(self, text: str) -> str:
        """Types Ctrl-C until `text` appears: one that comes just before a blocking call is lost, in any program."""
        for _ in range(int(PATIENCE_S)):
            self.type(CTRL_C)
            with suppress(TimeoutError):
                return self.read_until(text, patience_s=1)
        raise TimeoutError(f"Ctrl-C does not lead to {text!r}; the screen shows {self._seen!r}")

    def wait(self) -> int:
        """The exit status, once the program has ended by itself."""
        return self.process.wait(PATIENCE_S)

    def _read(self) -> str:
        try:
            data = os.read(self._terminal, 4096)
        except OSError as error:  # the other side is closed
            raise AssertionError(f"the program ended; the screen shows {self._seen!r}") from error
        text = data.decode(errors="replace")
        self.raw += text
        return _ESCAPE_SEQUENCES.sub("", text)


@contextmanager
def at_terminal(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[TerminalSession]:
    """`dijiang` at a terminal of its own; killed at the end if it still runs."""
    outside, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env={**os.environ, "TERM": "xterm", **(environment or {})},
        start_new_session=True,
    )
    os.close(inside)
    try:
        yield TerminalSession(process, outside)
    finally:
        process.kill()
        process.wait()
        os.close(outside)
