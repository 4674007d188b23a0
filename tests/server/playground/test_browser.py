"""The playground in a real browser, at real servers: no answer becomes markup, and everything can be used."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS as FAKE_OPTIONS
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine
from tests.server.playground.proxy import below
from tests.server.states.running import ANN, running
from tests.server.tools.test_tools import say
from tests.tiny_models import write_tiny_model

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
ATTACKS = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    "\n\n- <svg onload=window.hacked=1>\n\n**<b onclick=1>**\n"
    "\n```html\n<iframe srcdoc='<script>parent.hacked=1'>\n```\n"
    "\n# <a href='javascript:window.hacked=1'>x</a>\n"
)


@contextmanager
def page_at(address: str, **options: object) -> Iterator["playwright.Page"]:
    """A page that has loaded; nothing may go wrong on it, and it may ask nobody else for anything."""
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        page = browser.new_page(**options)
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda told: problems.append(told.text) if told.type == "error" else None)
        hosts: set[str] = set()
        page.on("request", lambda asked: hosts.add(urlsplit(asked.url).netloc))
        page.goto(address)
        yield page
        browser.close()
    assert hosts <= {urlsplit(address).netloc, ""}  # blobs have no host
    assert [text for text in problems if not text.startswith("Failed to load resource")] == []  # a refusal is no fault


def ask(page: "playwright.Page", text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn.assistant:last-child:not([aria-busy=true])")
    page.wait_for_selector("#send:not([hidden])")


def test_markup_in_messages_and_answers_stays_text(server: Loopback) -> None:
    say(server, ATTACKS)
    with page_at(server.url) as page:
        ask(page, ATTACKS)
        assert '<img src=x onerror="window.hacked=1">' in page.inner_text(".turn.assistant .said")
        assert page.inner_text(".turn.user .said").strip() == ATTACKS.strip()
        _is_unharmed(page)
        page.click("#place >> text=New")
        expect(page.locator(".turn")).to_have_count(0)


def test_thoughts_are_folded_and_stopping_frees_the_server(byte_tokenizer: Tokenizer) -> None:
    options = replace(FAKE_OPTIONS, reasoning_parser="think")
    with serve(FakeEngine(), options, byte_tokenizer) as server, page_at(server.url) as page:
        say(server, f"<think>{ATTACKS}</think>The answer.")
        ask(page, "Hm?")
        assert page.inner_text(".turn.assistant .said") == "The answer."
        assert (page.text_content(".thought div") or "").strip() == ATTACKS.strip()
        _is_unharmed(page)
        server.engine.hold_after = 12
        page.fill("#question", "Again")
        page.press("#question", "Enter")
        page.wait_for_selector("#stop:not([hidden])")
        server.wait_until(lambda: bool(server.engine.running))
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:not([hidden])")
        server.wait_until(lambda: not server.engine.running)


def test_conversations_are_saved_marked_rewound_forked_and_moved(tmp_path: Path) -> None:
    """Behind a key, below a path, on a phone."""
    model = write_tiny_model(tmp_path / "tiny")
    with (
        running(model, tmp_path / "states") as server,
        below("/some/path", server.base_url) as address,
        page_at(f"{address}/", viewport={"width": 390, "height": 844}, accept_downloads=True) as page,
    ):
        _give_key(page)
        page.evaluate("document.querySelectorAll('aside details').forEach((card) => { card.open = true; })")
        page.fill("[name=max_tokens]", "5")
        ask(page, "Hé?")
        _answer_dialog(page, "#place >> text=Save", "trip")
        page.wait_for_selector("#states li.current >> text=trip")
        _answer_dialog(page, "#place >> text=Mark this point", "here")
        page.wait_for_selector("[aria-label='Rewind to here']")
        sizes = page.locator("#states li.current .sizes")
        tokens = sizes.inner_text()
        ask(page, "And?")
        expect(sizes).not_to_have_text(tokens)
        page.click("[aria-label='Rewind to here']")
        expect(sizes).to_have_text(tokens)
        assert page.locator(".turn").count() == 2
        _answer_dialog(page, "#place >> text=Fork", "branch")
        page.wait_for_selector("#states li.current >> text=branch")
        with page.expect_download() as download:
            page.click("[aria-label='Export: branch']")
        assert download.value.suggested_filename == "branch.safetensors"
        page.set_input_files("#states-file", download.value.path())
        page.fill("#asker-value", "moved")
        page.click("#asker-ok")
        page.wait_for_selector("#states li.current >> text=moved")
        assert "are remembered" in page.inner_text("#log")
        ask(page, "Still there?")
        page.click("[aria-label='Delete: moved']")
        page.wait_for_selector("#states li >> text=moved", state="detached")
        assert ANN not in page.url
        assert page.evaluate("sessionStorage.getItem('dijiang.key')") == ANN
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone need not scroll sideways"


def test_tokens_are_rated_and_another_one_can_be_taken(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with running(model, tmp_path / "states") as server, page_at(server.base_url) as page:
        _give_key(page)
        page.click("#tab-tokens")
        page.evaluate("document.querySelectorAll('aside details').forEach((card) => { card.open = true; })")
        page.fill("[name=max_tokens]", "6")
        page.fill("#prompt", ATTACKS)
        page.click("#score")
        expect(page.locator(".token")).to_have_count(len(ATTACKS))
        _is_unharmed(page)
        page.fill("#prompt", "abc")
        page.click("#complete:not([disabled])")
        expect(page.locator(".token")).to_have_count(9)
        expect(page.locator("#complete")).to_be_enabled()
        page.focus("#tokens")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.get_attribute("#tokens", "aria-activedescendant") == "token-3"
        page.keyboard.press("Enter")  # goes on with the most likely other
        expect(page.locator("#complete")).to_be_enabled()
        assert page.input_value("#prompt").startswith("abc")
        assert len(page.input_value("#prompt")) >= 4


def _is_unharmed(page: "playwright.Page") -> None:
    assert page.evaluate("window.hacked") is None
    inside = ", ".join(f"{place} :is(img, script, svg, iframe, b, a)" for place in ("#log", "#tokens", "#details"))
    assert page.locator(inside).count() == 0


def _give_key(page: "playwright.Page") -> None:
    page.fill("#asker-value", ANN)  # the page asks for it by itself
    page.click("#asker-ok")
    expect(page.locator("#model")).to_have_text("tiny")


def _answer_dialog(page: "playwright.Page", button: str, value: str) -> None:
    page.click(button)
    page.fill("#asker-value", value)
    page.press("#asker-value", "Enter")
    page.wait_for_selector("#asker[open]", state="detached")
