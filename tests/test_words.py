"""The words of what users read: messages, help texts, the fields of the API, pages.

REFUSED has what is not to come back, and what to say instead. A string counts wherever it stands in the source; of
docstrings those count that are the help of a flag, a field, a command or a route. Tensor names of checkpoints stay.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.test_layout import PACKAGES, ROOT

REFUSED: Mapping[str, str] = {
    r"by chance|\bdice\b": "stochastic rounding, random bits",
    r"\bcompany\b": "in a batch, batch neighbours",
    r"\bin codes\b|\b(int8|int4|window's) codes\b|\bcodes and scales\b": "quantized weights, int8 values",
    r"\bun?rounded weights\b|\brounded weights\b": "quantized weights, plain weights",
    r"\bfar quer(y|ies)\b|\bnear (rows|tokens)\b": "linear branch, sliding window",
    r"\brecorded (decode )?(steps?|graphs?|kinds?|rows?)\b|\brecorder\b": "captured CUDA graphs, capture",
    r"\b(is|are|was|were) told\b|\b(told|tells?) apart\b": "reported, emitted, split out",
    r"\bput off\b|\btaken? up\b|\btakes (it|them) up\b": "suspended, claimed",
    r"\b(go|goes|went|gone|going) on\b|\bbegun again\b": "resume, continue",
    r"\bbeats? of the store\b|\bbur(y|ied)\b": "heartbeat, reap",
    r"\bsilent (linear|part)\b|\blinear part is silent\b": "disabled, weight zero",
    r"\bprocessors?\b": "CPU",
    r"\blikeliest\b": "most likely, greedy",
    r"\blet in\b": "has access, accepted",
    r"\bhold slots\b|\bheld slots\b": "defer commits, uncommitted",
    r"\brequests run or wait\b|\b\d+ may\b": "at capacity: N requests running or queued, limit M",
    r"\bdealt?\b|\bcollects? (the|a) (logits|state)": "scatter, gather, broadcast",
}
HELP = ("server/startup/settings.py", "server/protocol/")
ALLOWED = (
    "I have to give a talk about {}. What should I say?",
    "logits_processors",
    "custom_logit_processor",
    "mm_processor_kwargs",
    "processor",  # a key of the results of benchmarks
    "processor_seconds",
)


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a file that somebody may see, with their lines."""
    tree = ast.parse(path.read_text())
    shows_help = path.relative_to(ROOT).as_posix().startswith(HELP)
    silent = set()
    for node in ast.walk(tree):
        bodies = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
        for statement in (statement for body in bodies if isinstance(body, list) for statement in body):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                is_help = (shows_help and isinstance(node, ast.ClassDef)) or _is_command_or_route(node)
                silent |= set() if is_help else {id(statement.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.lineno, node.value


def _is_command_or_route(node: ast.AST) -> bool:
    """Whether typer or FastAPI show the docstring of it."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    shown = ("router.", "app.command", "app.callback")
    return node.name.endswith("_command") or any(
        ast.unparse(decorator).startswith(shown) for decorator in node.decorator_list
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    yield from enumerate(path.read_text().splitlines(), 1)


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("words", REFUSED)
def test_users_read_the_terms_of_the_field(words: str) -> None:
    pattern = re.compile(words)
    texts = [(path, *found) for path in SOURCES for found in _strings(path)]
    texts += [(path, *found) for path in PAGES if path.name != "CHANGELOG.md" for found in _lines(path)]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()[:100]}"
        for path, line, text in texts
        if not text.startswith(ALLOWED) and pattern.search(re.sub(r"`[^`]*`", "", text))
    ]
    if found:
        pytest.fail("\n".join([f"say: {REFUSED[words]}", *found]))
