"""A real Chromium for the tests of the page; without one they are skipped, and the end of the run says so loudly."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = playwright.expect
expect.set_options(timeout=30_000)  # as all that waits for a page
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (make browser)"),
    pytest.mark.usefixtures("chromium"),
]
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
WIDTHS = [pytest.param(WIDE, id="1280"), pytest.param(PHONE, id="390")]


class Watched:
    """Pages on which nothing may go wrong, and which may ask nobody else for anything."""

    def __init__(self, context: Any, address: str) -> None:
        self._context = context
        self._address = address
        self._problems: list[str] = []
        self._hosts: set[str] = set()
        context.set_default_timeout(30_000)

    def page(self, path: str = "") -> Any:
        """A new tab that has loaded."""
        page = self.blank()
        page.goto(f"{self._address}{path}")
        return page

    def blank(self) -> Any:
        """A new tab."""
        page = self._context.new_page()
        page.on("pageerror", lambda error: self._problems.append(str(error)))
        page.on("console", lambda told: self._problems.append(told.text) if told.type == "error" else None)
        page.on("request", lambda asked: self._hosts.add(urlsplit(asked.url).netloc))
        return page

    def check(self) -> None:
        assert self._hosts <= {urlsplit(self._address).netloc, ""}, self._hosts  # blobs have no host
        # That a request is refused is no fault of the page.
        problems = [text for text in self._problems if not text.startswith("Failed to load resource")]
        assert not problems, problems


class _Running:
    """What `started` has started."""

    driver: Any
    browser: Any


@contextmanager
def started() -> Iterator[None]:
    """One Chromium for the tests of a module. While it runs, this thread has an event loop of its own, and no other."""
    with playwright.sync_playwright() as _Running.driver:
        _Running.browser = _Running.driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield
        _Running.browser.close()


@contextmanager
def browser_at(address: str, **options: Any) -> Iterator[Watched]:
    """A browser that knows nothing yet, and forgets everything at the end."""
    context = _Running.browser.new_context(**{**WIDE, **options})
    watched = Watched(context, address)
    try:
        yield watched
    finally:
        context.close()
    watched.check()


@contextmanager
def page_at(address: str, **options: Any) -> Iterator[Any]:
    """One page of such a browser."""
    with browser_at(address, **options) as browser:
        yield browser.page()


@contextmanager
def profile_at(folder: Path, address: str) -> Iterator[Watched]:
    """A browser whose profile is in a folder; it may be killed, and opened again."""
    launch = _Running.driver.chromium.launch_persistent_context
    context = launch(folder, executable_path=CHROMIUM, args=[*FLAGS], **WIDE)
    yield Watched(context, address)
    with suppress(playwright.Error):  # it was killed
        context.close()


def begin(page: Any, text: str) -> None:
    """Says something and waits until an answer begins."""
    count = page.locator(".turn.assistant").count()
    page.fill("#question", text)
    page.locator("#send:enabled").wait_for()
    page.press("#question", "Enter")
    expect(page.locator(".turn.assistant")).to_have_count(count + 1)


def ended(page: Any) -> None:
    """Waits for the end of the answer."""
    page.locator("#send:not([hidden])").wait_for()
    page.locator(".turn.assistant:last-child:not([aria-busy=true])").wait_for()


def ask(page: Any, text: str) -> None:
    begin(page, text)
    ended(page)


def said(page: Any) -> list[str]:
    """The texts of all turns."""
    return [text.strip() for text in page.locator(".turn .said").all_inner_texts()]


def shows(page: Any, *texts: str) -> None:
    """Waits until these are the texts of all turns."""
    expect(page.locator(".turn .said")).to_have_text([*texts])


def give_key(page: Any, key: str) -> None:
    """Answers the dialog that asks for it."""
    page.fill("#asker[open] #asker-value", key)
    page.click("#asker-ok")


def answer_dialog(page: Any, button: str, value: str) -> None:
    page.click(button)
    page.fill("#asker[open] #asker-value", value)
    page.press("#asker-value", "Enter")
    page.locator("#asker[open]").wait_for(state="detached")


def open_cards(page: Any) -> None:
    """Opens everything at the side; on a phone the drawer too."""
    if page.locator("#menu").is_visible() and not page.locator("#side.open").count():
        page.click("#menu")
        page.locator("#side.open").wait_for()
    closed = page.locator("aside details:not([open]) > summary")
    while closed.count():
        closed.first.click()


def close_drawer(page: Any) -> None:
    if page.locator("#side.open").count():
        page.click("#menu-close")


def name_of_download(page: Any, button: str) -> tuple[str, Path]:
    with page.expect_download() as download:
        page.click(button)
    return download.value.suggested_filename, download.value.path()
