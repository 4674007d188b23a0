"""The fenced blocks of the pages, and the commands of those that are typed at a shell."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.test_layout import ROOT

RUN = ("bash", "python", "js")
PARSED = ("json", "toml", "yaml")
SHOWN = ("text", "promql")
"""Figures, output, and expressions of other programs: nothing to run."""
_FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        page: path from the repository's root.
        line: of its fence, from 1.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language or 'no language'})"

    @property
    def commands(self) -> list[str]:
        """Of a shell block: whole commands, those over several lines in one piece; comments left out."""
        found, pending = [], ""
        for line in self.text.splitlines(keepends=True):
            pending += line
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quotation is still open
                continue
            if not pending.endswith("\\\n"):
                found += [pending.strip()] if words else []
                pending = ""
        assert not pending, f"{self}: a quotation is never closed"
        return found


def pages() -> list[Path]:
    """Every page that users read."""
    written = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "dijiang_model" / "README.md"]
    return sorted(path for path in written if path.name != "CHANGELOG.md")


def blocks() -> Iterator[Block]:
    """Page by page, from top to bottom."""
    for path in pages():
        page, content = path.relative_to(ROOT).as_posix(), path.read_text()
        for match in _FENCE.finditer(content):
            line = content.count("\n", 0, match.start()) + 1
            yield Block(page, line, match["language"], match["text"])
