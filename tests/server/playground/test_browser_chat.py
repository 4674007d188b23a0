"""Talking, in a real browser: branches, errors, keys, waiting, Markdown that is shown and markup that is not."""

from dataclasses import replace
from typing import Any

import pytest

from server.keys import hash_key
from server.options import ServiceOptions
from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS as FAKE_OPTIONS
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine
from tests.server.playground.browser import (
    WIDTHS,
    ask,
    begin,
    browser_at,
    close_drawer,
    ended,
    expect,
    give_key,
    needs_browser,
    open_cards,
    page_at,
    said,
    shows,
)
from tests.server.tools.test_tools import prompt_of, say

pytestmark = needs_browser
ATTACKS = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    "\n\n- <svg onload=window.hacked=1>\n\n**<b onclick=1>** [x](javascript:window.hacked=1)\n"
    "\n```html\n<iframe srcdoc='<script>parent.hacked=1'>\n```\n"
    "\n# <a href='javascript:window.hacked=1'>x</a>\n"
)
RICH = """# Title

Some *emphasis*, **strength**, `code` and [a link](https://example.com/x).

| a | b |
|:--|--:|
| 1 | 2 |

- one
- two

Inline \\(a_1 * b_2\\), and

$$
x^2
$$

```python
def f(x):
    return "s"  # why
```

שלום עולם
"""


def is_unharmed(page: Any) -> None:
    assert page.evaluate("window.hacked") is None
    inside = ", ".join(f"{place} :is(img, script, svg, iframe, b, a)" for place in ("#log", "#tokens", "#details"))
    assert page.locator(inside).count() == 0


def test_markup_in_messages_and_answers_stays_text(server: Loopback) -> None:
    say(server, ATTACKS)
    with page_at(server.url) as page:
        ask(page, ATTACKS)
        page.locator(".turn.assistant .said pre").wait_for()
        assert '<img src=x onerror="window.hacked=1">' in page.inner_text(".turn.assistant .said")
        assert page.inner_text(".turn.user .said").strip() == ATTACKS.strip()
        is_unharmed(page)


@pytest.mark.parametrize("width", WIDTHS)
def test_markdown_is_shown_with_tables_links_mathematics_and_colours(server: Loopback, width: dict[str, Any]) -> None:
    say(server, RICH)
    with page_at(server.url, **width, permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "Everything, please")
        answer = page.locator(".turn.assistant .said")
        expect(answer.locator("h3")).to_have_text("Title")
        expect(answer.locator("em, strong")).to_have_count(2)
        expect(answer.locator("td.align-right")).to_have_text("2")
        expect(answer.locator("li")).to_have_count(2)
        expect(answer.locator(".math").first).to_have_text("a_1 * b_2")
        expect(answer.locator(".math.display")).to_have_text("x^2")
        expect(answer.locator(".code-comment")).to_contain_text("# why")
        link = answer.locator("a")
        assert (link.get_attribute("href"), link.get_attribute("target")) == ("https://example.com/x", "_blank")
        assert "noopener" in (link.get_attribute("rel") or "")
        assert answer.locator("p").last.evaluate("(p) => getComputedStyle(p).direction") == "rtl"
        page.click("text=Copy code")
        expect(page.locator(".block-head button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return "s"  # why'
        page.locator(".turn.assistant .foot").get_by_text("Copy", exact=True).click()
        expect(page.locator(".turn.assistant .foot")).to_contain_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == RICH
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone need not scroll sideways"


def test_thoughts_are_folded_and_stopping_frees_the_server(byte_tokenizer: Tokenizer) -> None:
    options = replace(FAKE_OPTIONS, reasoning_parser="think")
    with serve(FakeEngine(), options, byte_tokenizer) as server, page_at(server.url) as page:
        say(server, f"<think>{ATTACKS}</think>The answer.")
        ask(page, "Hm?")
        assert page.inner_text(".turn.assistant .said") == "The answer."
        assert (page.text_content(".thought div") or "").strip() == ATTACKS.strip()
        is_unharmed(page)
        server.engine.hold_after = 12
        begin(page, "Again")
        server.wait_until(lambda: bool(server.engine.running))
        page.keyboard.press("Escape")
        ended(page)
        server.wait_until(lambda: not server.engine.running)
        expect(page.locator(".turn.assistant .note")).to_have_text("Stopped.")
        server.service.renderer.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_answers_are_made_again_and_messages_edited_as_branches(server: Loopback, width: dict[str, Any]) -> None:
    with page_at(server.url, **width) as page:
        say(server, "One.")
        ask(page, "Question")
        say(server, "Two.")
        page.click("text=Regenerate")
        ended(page)
        shows(page, "Question", "Two.")
        page.click(".turn.user >> text=Edit")
        page.fill(".editor textarea", "Other question")
        say(server, "Three.")
        page.press(".editor textarea", "Enter")
        expect(page.locator(".turn.assistant .said")).to_have_text("Three.")
        ended(page)
        assert "Other question" in prompt_of(server)
        page.click(".turn.user >> [aria-label='Previous version']")
        expect(page.locator(".turn.user .said")).to_have_text("Question")
        shows(page, "Question", "Two.")
        page.click(".turn.assistant >> [aria-label='Previous version']")
        expect(page.locator(".turn.assistant .said")).to_have_text("One.")
        expect(page.locator(".turn.assistant >> [aria-label='Previous version']")).to_be_disabled()
        page.click(".turn.user >> text=Edit")
        page.press(".editor textarea", "Escape")
        shows(page, "Question", "One.")
        expect(page.locator(".stats")).to_contain_text("tokens")
        expect(page.locator(".stats")).to_contain_text("first after")


def test_an_error_in_mid_answer_keeps_the_text_and_offers_to_continue(server: Loopback) -> None:
    with page_at(server.url) as page:
        say(server, "Once upon a time.")
        server.engine.fail_after = 10  # the text of the last token goes with the error
        begin(page, "A story")
        ended(page)
        shows(page, "A story", "Once upon")
        expect(page.locator(".turn.assistant .note")).to_have_text("the engine died")
        server.engine.fail_after = None
        say(server, " a time.")
        page.click("#panel-chat >> text=Continue")
        ended(page)
        expect(page.locator(".turn.assistant .said")).to_have_text("Once upon a time.")
        assert prompt_of(server).endswith("Once upon")
        expect(page.locator("#panel-chat >> text=Continue")).to_have_count(0)


def test_an_answer_that_was_cut_at_the_limit_is_continued(server: Loopback) -> None:
    with page_at(server.url) as page:
        say(server, "Hello there.")
        open_cards(page)
        page.fill("[name=max_tokens]", "5")
        ask(page, "Hi")
        expect(page.locator(".turn.assistant .note")).to_contain_text("limit of tokens")
        say(server, " you.")
        page.click("#panel-chat >> text=Continue")
        ended(page)
        expect(page.locator(".turn.assistant .said")).to_have_text("Hello you.")


def test_a_refusal_is_kept_with_the_message_and_can_be_tried_again(server: Loopback) -> None:
    with page_at(server.url) as page:
        server.engine.capacity = 0
        ask(page, "Anybody there?")
        expect(page.locator(".turn.assistant .note")).to_contain_text("at capacity")
        server.engine.capacity = 8
        say(server, "Yes.")
        page.click("#panel-chat >> text=Try again")
        expect(page.locator(".turn.assistant .said")).to_have_text("Yes.")
        ended(page)
        shows(page, "Anybody there?", "Yes.")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_wrong_key_is_named_and_asked_for(
    byte_tokenizer: Tokenizer, options: ServiceOptions, width: dict[str, Any]
) -> None:
    options = replace(options, key_hashes=frozenset({hash_key(b"secret")}))
    with serve(FakeEngine(), options, byte_tokenizer) as server, page_at(server.url, **width) as page:
        expect(page.locator("#asker-title")).to_have_text("This server asks for a key.")
        expect(page.locator("#send")).to_be_disabled()
        give_key(page, "wrong")
        expect(page.locator("#asker-title")).to_have_text("The server does not know this key.")
        give_key(page, "secret")
        expect(page.locator("#model")).to_have_text("org/tiny")
        ask(page, "Hi")
        other = hash_key(b"another")
        server.service.change_keys(key_hashes=frozenset({other}), admin_key_hashes=frozenset(), keys=())
        begin(page, "Still there?")
        expect(page.locator("#asker-title")).to_have_text("The server does not know this key.")
        give_key(page, "another")
        page.click("#panel-chat >> text=Try again")
        ended(page)
        assert len(said(page)) == 4
        assert page.evaluate("sessionStorage.getItem('dijiang.key')") == "another"
        assert "another" not in page.url
        server.service.renderer.close()


def test_the_page_waits_while_the_model_loads(server: Loopback) -> None:
    server.engine.status = "loading"
    with page_at(server.url) as page:
        expect(page.locator("#waiting")).to_have_text("The model is loading …")
        page.fill("#question", "Hi")
        expect(page.locator("#send")).to_be_disabled()
        expect(page.locator("#complete")).to_be_disabled()
        server.engine.status = "ready"
        expect(page.locator("#waiting")).to_be_hidden()
        page.press("#question", "Enter")
        ended(page)
        assert said(page)[0] == "Hi"


@pytest.mark.parametrize("width", WIDTHS)
def test_settings_are_remembered_and_the_model_s_own_are_shown(server: Loopback, width: dict[str, Any]) -> None:
    with page_at(server.url, **width) as page:
        expect(page.locator("#model")).to_have_text("org/tiny")
        open_cards(page)
        expect(page.locator("#settings-reset")).to_be_disabled()
        assert page.get_attribute("[name=temperature]", "placeholder") == "1"
        page.fill("[name=seed]", "7")
        page.fill("#system", "Be brief.")
        page.locator("#system").blur()
        page.reload()
        open_cards(page)
        assert (page.input_value("[name=seed]"), page.input_value("#system")) == ("7", "Be brief.")
        close_drawer(page)
        ask(page, "Hi")
        assert server.engine.submitted[-1].sampling.seed == 7
        assert "Be brief." in prompt_of(server)
        open_cards(page)
        page.fill("[name=temperature]", "9")
        close_drawer(page)
        page.fill("#question", "Not lost")
        page.press("#question", "Enter")
        expect(page.locator("#chat-error")).to_contain_text("Temperature")
        assert page.input_value("#question") == "Not lost"
        open_cards(page)
        page.click("#settings-reset")
        assert page.input_value("[name=temperature]") == ""


def test_what_is_typed_before_the_page_has_loaded_stays(server: Loopback) -> None:
    with browser_at(server.url) as browser:
        page = browser.blank()
        waiting: list[Any] = []
        page.route("**/app.mjs", lambda route: waiting.append(route))
        page.goto(server.url, wait_until="commit")
        page.fill("#question", "Early")
        while not waiting:
            page.wait_for_timeout(10)
        waiting[0].continue_()
        page.locator("#send:enabled").wait_for()
        assert page.input_value("#question") == "Early"


def test_other_conversations_can_be_read_while_an_answer_grows(server: Loopback) -> None:
    with page_at(server.url) as page:
        say(server, "Old answer.")
        ask(page, "Old question")
        page.click("#new")
        server.engine.hold_after = 4
        say(server, "New answer.")
        begin(page, "New question")
        server.wait_until(lambda: bool(server.engine.running))
        page.click("#talks >> text=Old question")
        shows(page, "Old question", "Old answer.")
        expect(page.locator("#stop")).to_be_hidden()
        page.click("#talks >> text=New question")
        expect(page.locator("#stop")).to_be_visible()
        page.click("#stop")
        ended(page)
        assert said(page)[0] == "New question"
