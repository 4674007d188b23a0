"""The files of the playground: served as they should be, complete, and without a way to the outside."""

import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from setuptools import find_packages

from server.keys import hash_key
from server.options import ServiceOptions
from server.playground import load_assets
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "server/playground"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in {".html", ".css", ".mjs", ".svg"})


def test_the_page_and_its_files_are_served(server: Loopback) -> None:
    page = server.http.get("/", headers=BROWSER)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.content == (FOLDER / "index.html").read_bytes()
    for name in FILES:
        answer = server.http.get(f"/playground/{name}")
        if name == "index.html":
            assert answer.status_code == 404
            continue
        assert answer.content == (FOLDER / name).read_bytes()
        if name.endswith(".mjs"):  # else a browser does not run it
            assert answer.headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize("path", ["/", "/playground/app.mjs", "/playground/icon.svg"])
def test_the_page_may_fetch_nothing_from_elsewhere_and_run_nothing_inline(server: Loopback, path: str) -> None:
    headers = server.http.get(path, headers=BROWSER).headers
    policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


@pytest.mark.parametrize("path", ["/", "/playground/style.css"])
def test_a_file_that_a_browser_has_is_not_sent_again(server: Loopback, path: str) -> None:
    whole = server.http.get(path, headers=BROWSER)
    assert whole.headers["cache-control"] == "no-cache"
    for known in (whole.headers["etag"], f'"other", W/{whole.headers["etag"]}'):
        again = server.http.get(path, headers={**BROWSER, "if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == whole.headers["etag"]
    assert server.http.get(path, headers={**BROWSER, "if-none-match": '"other"'}).status_code == 200
    head = server.http.head(path, headers=BROWSER)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


def test_programs_that_ask_for_json_are_told_as_ever_that_nothing_is_there(server: Loopback) -> None:
    for accept in ("application/json", "application/json, */*;q=0.5"):
        answer = server.http.get("/", headers={"accept": accept})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert server.http.get("/", headers={"accept": "*/*"}).status_code == 200
    assert server.http.post("/", json={}).json()["error"]["code"] == "method_not_allowed"
    for path in ("/playground/", "/playground/../app.py", "/playground/%2e%2e/settings.py", "/playground/nothing.mjs"):
        assert server.http.get(path).status_code == 404
    assert "/playground" not in server.http.get("/openapi.json").text


def test_the_page_needs_no_key_and_what_it_asks_for_does(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    options = replace(options, key_hashes=frozenset({hash_key(b"secret")}))
    with serve(FakeEngine(), options, byte_tokenizer) as server:
        assert server.http.get("/", headers=BROWSER).status_code == 200
        assert server.http.get("/playground/app.mjs").status_code == 200
        for path in ("/v1/models", "/v1/capacity", "/playground/nothing", "/playground"):
            assert server.http.get(path).status_code == 401


def test_an_operator_may_turn_it_off(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    with serve(FakeEngine(), replace(options, playground=False), byte_tokenizer) as server:
        assert server.http.get("/", headers=BROWSER).status_code == 404
        assert server.http.get("/playground/app.mjs").status_code == 404


class _Addresses(HTMLParser):
    """Everything that a page refers to, and how much is inline."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.found += [value for name in ("src", "href") if (value := names.get(name)) is not None]
        self.inline += [name for name in names if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in names) else []


def test_everything_that_the_page_refers_to_is_there_and_relative() -> None:
    """Relative, so that the page works below a path that a proxy puts it under."""
    page = _Addresses()
    page.feed((FOLDER / "index.html").read_text())
    assert page.inline == []
    local = [address for address in page.found if not address.startswith("#")]
    assert "playground/app.mjs" in local
    assert all(f"/{address}" in load_assets() for address in local)
    reached, waiting = set(), ["app.mjs"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        imported = re.findall(r'^import .* from "\./([\w.]+)";$', (FOLDER / name).read_text(), re.MULTILINE)
        waiting += [other for other in imported if other not in reached]
    assert reached == {name for name in FILES if name.endswith(".mjs")}


def test_no_source_has_a_way_from_text_to_markup_or_to_another_host() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|"
        r"createContextualFragment|setHTML|localStorage|document\.cookie|https?://(?!www\.w3\.org/2000/svg)|//cdn"
    )
    for name in FILES:
        assert forbidden.findall((FOLDER / name).read_text()) == [], name


def test_a_built_package_carries_the_files() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "server.playground" in find_packages(str(ROOT), include=tool["packages"]["find"]["include"])
    patterns = tool["package-data"]["server.playground"]
    assert sorted(path.name for pattern in patterns for path in FOLDER.glob(pattern)) == FILES
    sent = (ROOT / ".dockerignore").read_text().split("\n")
    assert "!server" in sent, "the image is built from these files, too"
    assert not [line for line in sent if line.endswith((".html", ".mjs", ".css", ".svg"))]
