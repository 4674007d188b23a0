"""What an operator is told while a server starts: sentences for eyes, or lines of the log where machines read it."""

from collections.abc import Mapping

import structlog
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

logger = structlog.stdlib.get_logger("dijiang.start")


class Notices:
    """Attributes:
    console: for eyes alone, such as bars of progress; it is quiet where the log is JSON.
    """

    def __init__(self, console: Console | None = None, *, as_json: bool = False) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.console.quiet = as_json
        self._as_json = as_json

    def say(self, text: str) -> None:
        self._tell("info", text, "")

    def warn(self, text: str) -> None:
        self._tell("warning", text, "[yellow]warning:[/yellow] ")

    def fail(self, text: str) -> None:
        """Each line is a sentence of its own."""
        for line in text.split("\n"):
            self._tell("error", line, "[red]error:[/red] ")

    def show(self, title: str, rows: Mapping[str, str]) -> None:
        """A table, or one line of the log with its rows as fields; a `warning` stands out."""
        if self._as_json:
            logger.info(title, **{name.replace(" ", "_"): value for name, value in rows.items()})
            return
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        for name, value in rows.items():
            table.add_row(name, Text(value), style="yellow" if name == "warning" else None)
        self.console.print(table)

    def _tell(self, level: str, text: str, mark: str) -> None:
        if self._as_json:
            getattr(logger, level)(text)
        else:
            self.console.print(f"{mark}{escape(text)}", highlight=False)
