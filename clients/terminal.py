"""The conversation at a terminal, or through a pipe: lines in, streamed answers out, commands with a slash."""

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console

from clients.conversation import Conversation, Spoken
from clients.errors import APIError, ClientError

PROMPT = "you> "
MORE = "...> "
HELP = """\
/system TEXT  set the system prompt; without TEXT: remove it
/reset        forget the conversation, keep the system prompt
/save FILE    write the conversation as JSON
/help         show this
/exit         leave (so does Ctrl-D)
A pasted text is one message. Several lines: Alt-Enter, or a backslash at the end of a line.
Ctrl-C stops an answer. A message that begins with a slash: put a space before it."""
INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells have it."""

# Control characters of an answer must not reach the terminal: they could rewrite what the screen shows.
_CONTROL_CODES = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
_VISIBLE = dict.fromkeys(_CONTROL_CODES, "\N{REPLACEMENT CHARACTER}")


class Terminal:
    """Reads turns and commands until the end of input."""

    def __init__(self, conversation: Conversation, *, output: Console, notices: Console) -> None:
        """Args:
        conversation: what is talked about.
        output: where answers go.
        notices: where everything else goes, so that a pipe carries answers only.
        """
        self._conversation = conversation
        self._output = output
        self._notices = notices
        self._is_interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], bool]] = {
            "/system": self._set_system,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> int:
        """Converses; returns the exit status: 0, or 1 if a piped conversation had an error.

        An error ends a piped conversation; at a terminal the user decides.
        """
        while True:
            try:
                line = self._read_line()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if not self._is_interactive:
                    return INTERRUPTED
                self._notice("\n(/exit or Ctrl-D to leave)")
                continue
            if line.strip() == "/exit":
                return 0
            if line.strip() != "" and not self._handle(line) and not self._is_interactive:
                return 1

    def _read_line(self) -> str:
        if self._is_interactive:
            line = input(PROMPT)
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{input(MORE)}"
            return line
        line = sys.stdin.readline()
        if line == "":
            raise EOFError
        return line.rstrip("\n")

    def _handle(self, line: str) -> bool:
        """Whether it went well."""
        if not line.startswith("/"):
            return self._answer(line.strip())
        name, _, argument = line.partition(" ")
        command = self._commands.get(name.strip())
        if command is None:
            return self._fail(f"no command {name.strip()}; /help lists them")
        return command(argument.strip())

    def _answer(self, text: str) -> bool:
        was_thought = False
        try:
            with closing(self._conversation.ask(text)) as pieces:
                for piece in pieces:
                    if was_thought and not piece.is_thought:
                        self._write(Spoken("\n\n", is_thought=True))
                    was_thought = piece.is_thought
                    self._write(piece)
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            self._notice("\n(stopped)")
            return True
        except ClientError as error:
            self._output.out("")
            has_no_template = isinstance(error, APIError) and error.code == "no_chat_template"
            program = sys.argv[0] if Path(sys.argv[0]).name == "dijiang" else "dijiang"
            hint = f"\nIt continues texts: echo 'Once upon a time' | {program} complete"
            return self._fail(f"{error}{hint if has_no_template else ''}")
        self._output.out("")
        return True

    def _write(self, piece: Spoken) -> None:
        if self._output.is_terminal:
            style = "dim" if piece.is_thought else None
            self._output.out(piece.text.translate(_VISIBLE), end="", highlight=False, style=style)
        elif not piece.is_thought:
            # rich would take some control characters out; a pipe gets every byte of the answer, and nothing else.
            self._output.file.write(piece.text)
            self._output.file.flush()

    def _set_system(self, text: str) -> bool:
        self._conversation.system = text if text != "" else None
        self._notice("system prompt set" if text != "" else "system prompt removed")
        return True

    def _reset(self, _: str) -> bool:
        self._conversation.reset()
        self._notice("conversation forgotten")
        return True

    def _save(self, name: str) -> bool:
        if name == "":
            return self._fail("/save needs a file name")
        try:
            self._conversation.save(Path(name).expanduser())
        except OSError as error:
            return self._fail(f"cannot write {name}: {error.strerror}")
        self._notice(f"saved to {name}")
        return True

    def _help(self, _: str) -> bool:
        self._notice(HELP)
        return True

    def _notice(self, text: str) -> None:
        self._notices.print(text, style="dim", markup=False, highlight=False)

    def _fail(self, text: str) -> bool:
        self._notices.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        return False
