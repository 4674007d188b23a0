"""The pages lead somewhere: every link to a file is right, and the map has every package on it."""

import re
from pathlib import Path

import pytest

from tests.test_layout import PACKAGES, ROOT

PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dijiang_model").rglob("*.md"))
    if ".venv" not in path.parts
)
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)")
FIRST_SCREEN = 60


def _anchors(page: Path) -> set[str]:
    """The names of a page's headings, as they are made from their words."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in LINK.findall(text):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path), f"{target}#{anchor}"


def test_the_map_names_every_package() -> None:
    named = set(re.findall(r"`([\w/]+)`", (ROOT / "docs/architecture.md").read_text()))
    folders = {
        path.parent.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert folders - {"server", "clients/examples"} <= named


def test_the_map_names_no_file_that_is_not_there() -> None:
    named = re.findall(
        r"`((?:server|dijiang_model|clients|benchmarks|tests)/[\w/]+\.py)`", (ROOT / "docs/architecture.md").read_text()
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_the_first_screen_says_what_it_is_and_where_to_read_on() -> None:
    screen = (ROOT / "README.md").read_text().splitlines()[:FIRST_SCREEN]
    for part in ("docs/decoding.png", "| 131,072 |", "make serve", "make test", "**Status.**", "(LICENSE)"):
        assert any(part in line for line in screen), part
