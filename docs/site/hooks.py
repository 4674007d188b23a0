"""What makes a site of the pages as they lie in the repository; called by mkdocs.

Pages outside docs/ become pages of the site, folders of pages get an index, links to source files become plain text,
and the tables of settings, fields and sizes are made from the code.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the tables import the server's types

from tables import TABLES  # noqa: E402 (beside this file)

OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "dijiang_model/README.md": "mathematics.md",
    "dijiang_model/adapters/smollm2-135m-dijiang.md": "default-model.md",
    "dijiang_model/conversion/calibration/text.md": "calibration-text.md",
}
"""Pages of the repository, and their names on the site."""

INDEXED = {"docs/decisions": "Decisions", "docs/log": "Log of experiments"}
"""Folders of pages, and the titles of their indexes."""

_LINK = re.compile(r"(?P<shown>!?\[(?:[^\]\\]|\\.)*\])\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"(```.*?```)", re.DOTALL)
_MARKER = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/."""
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for folder, title in INDEXED.items():
        name = folder.removeprefix("docs/")
        files.append(File.generated(config, f"{name}/index.md", content=_index(ROOT / folder, title)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page as the site shows it: links that lead somewhere there, tables in place of their markers."""
    site_path = page.file.src_uri
    source = {name: source for source, name in OUTSIDE.items()}.get(site_path, f"docs/{site_path}")
    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(lambda match: _link(match, source, site_path), part) for part in parts[::2]]
    return _MARKER.sub(lambda match: TABLES[match[1]](), "".join(parts))


def _link(match: re.Match[str], source: str, site_path: str) -> str:
    shown, anchor = match["shown"], match["anchor"] or ""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
    if not (ROOT / target).exists():
        return match[0]  # mkdocs says so
    name = _name_on_site(target)
    if name is None:
        text = shown.removeprefix("[").removesuffix("]")
        return text if target.rpartition("/")[2] in text else f"{text} (`{target}`)"
    return f"{shown}({posixpath.relpath(name, posixpath.dirname(site_path) or '.')}{anchor})"


def _name_on_site(target: str) -> str | None:
    """None: it is no page of the site."""
    if target in OUTSIDE:
        return OUTSIDE[target]
    if target in INDEXED:
        return f"{target.removeprefix('docs/')}/index.md"
    if target.startswith("docs/") and (ROOT / target).is_file():
        return target.removeprefix("docs/")
    return None


def _index(folder: Path, title: str) -> str:
    pages = sorted(folder.glob("*.md"), reverse=title.startswith("Log"))
    return "\n".join([f"# {title}", "", *(f"- [{_title(page)}]({page.name})" for page in pages), ""])


def _title(page: Path) -> str:
    return next(line for line in page.read_text().splitlines() if line.startswith("# ")).removeprefix("# ")


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Pages that an index lists are not in the navigation, on purpose."""
    listed = "\n".join(f"/{folder.removeprefix('docs/')}/*.md" for folder in INDEXED)
    config.not_in_nav = type(config).not_in_nav.validate(f"{listed}\n!/*/index.md")
    return config
