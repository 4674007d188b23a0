"""The page at 1280 and 390 pixels, light and dark: nothing overlaps or is too small, and a keyboard is enough."""

from typing import Any

import pytest

from tests.server.conftest import Loopback
from tests.server.playground.browser import (
    PHONE,
    WIDTHS,
    ask,
    close_drawer,
    expect,
    needs_browser,
    open_cards,
    page_at,
)
from tests.server.playground.test_browser_chat import RICH
from tests.server.tools.test_tools import say

pytestmark = needs_browser
FINGER = 44
SMALL = f"""() => [...document.querySelectorAll("button, input:not([type=file]), summary, textarea, [role=tab]")]
    .filter((one) => one.checkVisibility({{ visibilityProperty: true }}))
    .map((one) => [one.id || one.textContent, one.getBoundingClientRect()])
    .filter(([, box]) => box.width < {FINGER} || box.height < {FINGER})
    .map(([name, box]) => `${{name}} ${{box.width}} x ${{box.height}}`)"""
UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, a, [role=listbox], [role=log], dialog")]
    .filter((one) => !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.labels?.length
        || one.textContent.trim()))
    .map((one) => one.outerHTML)"""
# Contrast of text with what is behind it (WCAG 2.2, 1.4.3).
FAINT = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = colour.slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const over = (top, below) => below.slice(0, 3).map((v, i) => v + (top[3] ?? 1) * (top[i] - v));
    const behind = (one) => {
        if (one === null) return [255, 255, 255];
        const colour = numbers(getComputedStyle(one).backgroundColor);
        return (colour[3] ?? 1) === 1 ? colour : over(colour, behind(one.parentElement));
    };
    const texts = [...document.querySelectorAll("body *")].filter((one) =>
        one.checkVisibility({ visibilityProperty: true }) && !one.disabled
        && [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    return texts.flatMap((one) => {
        const [a, b] = [light(numbers(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        const name = one.className || one.id || one.tagName;
        return ratio < 4.5 ? [`${name}: ${one.textContent.slice(0, 30)} ${ratio.toFixed(2)}`] : [];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_has_a_name_and_can_be_read(server: Loopback, width: dict[str, Any], scheme: str) -> None:
    say(server, RICH)
    with page_at(server.url, **width, color_scheme=scheme) as page:
        ask(page, "Hello")
        page.locator(".code-comment").wait_for()
        page.click("text=Regenerate")
        page.locator(".versions").wait_for()
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(FAINT) == []
        open_cards(page)
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(FAINT) == []
        close_drawer(page)
        page.click("#tab-tokens")
        assert page.evaluate(FAINT) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", WIDTHS)
def test_who_reads_the_end_goes_on_reading_it(server: Loopback, width: dict[str, Any]) -> None:
    say(server, f"{RICH}\n\n{RICH}")
    with page_at(server.url, **width) as page:
        ask(page, "Hello")
        end = page.locator(".turn.assistant .foot")
        page.locator(".code-comment").first.wait_for()
        expect(end).to_be_in_viewport(ratio=1)
        page.fill("#question", "several\nlines\nof a\nquestion")
        expect(end).to_be_in_viewport(ratio=1)
        page.reload()
        page.locator(".code-comment").first.wait_for()
        expect(end).to_be_in_viewport(ratio=1)
        page.locator("#log").evaluate("log => log.scrollTo(0, 0)")
        expect(page.locator(".turn.user .said")).to_be_in_viewport(ratio=1)
        page.fill("#question", "a line")
        ask(page, "Once more")
        expect(page.locator(".turn.assistant .foot").last).to_be_in_viewport(ratio=1)
        page.locator("#log").evaluate("log => log.scrollTo(0, 0)")
        page.fill("#question", "several\nlines\nof a\nquestion")
        expect(page.locator(".turn.user .said").first).to_be_in_viewport(ratio=1)


def test_on_a_phone_the_side_is_a_drawer_and_everything_is_large_enough_for_a_finger(server: Loopback) -> None:
    say(server, RICH)
    with page_at(server.url, **PHONE) as page:
        ask(page, "Hello")
        page.locator(".block-head").wait_for()
        assert page.evaluate(SMALL) == []
        expect(page.locator("#side")).to_be_hidden()
        page.click("#menu")
        expect(page.locator("#menu")).to_have_attribute("aria-expanded", "true")
        expect(page.locator("#menu-close")).to_be_focused()
        open_cards(page)
        assert page.evaluate(SMALL) == []
        assert page.evaluate("document.getElementById('main').inert"), "what is behind is out of the keyboard's way"
        page.keyboard.press("Escape")
        expect(page.locator("#side")).to_be_hidden()
        expect(page.locator("#menu")).to_be_focused()
        page.click("#menu")
        page.mouse.click(385, 400)  # beside it
        expect(page.locator("#side")).to_be_hidden()
        page.click("#tab-tokens")
        assert page.evaluate(SMALL) == []
        page.click("#tab-chat")
        page.click("#top-new")
        expect(page.locator(".welcome")).to_be_visible()
        assert page.evaluate(SMALL) == []


def test_a_keyboard_is_enough(server: Loopback) -> None:
    say(server, "Yes.")
    with page_at(server.url) as page:
        expect(page.locator("#model")).to_have_text("org/tiny")
        expect(page.locator("#question")).to_be_focused()
        page.keyboard.type("With keys")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("alone")
        page.keyboard.press("Enter")
        expect(page.locator(".turn.user .said")).to_have_text("With keys alone")
        page.locator("#send:not([hidden])").wait_for()
        page.keyboard.press("Shift+Tab")
        names = []
        for _ in range(12):
            names.append(page.evaluate("document.activeElement.textContent || document.activeElement.id"))
            page.keyboard.press("Shift+Tab")
        assert {"Regenerate", "Copy", "Edit", "Save as state"} <= set(names)
        page.focus("#tab-chat")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#panel-tokens")).to_be_visible()
        expect(page.locator("#tab-tokens")).to_be_focused()
