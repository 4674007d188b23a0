"""States and tokens in a real browser, at a real server with a tiny model: behind a key, below a path, on a phone."""

from pathlib import Path

from tests.server.playground.browser import (
    PHONE,
    answer_dialog,
    ask,
    close_drawer,
    expect,
    give_key,
    needs_browser,
    open_cards,
    page_at,
)
from tests.server.playground.proxy import below
from tests.server.playground.test_browser_chat import ATTACKS, is_unharmed
from tests.server.states.running import ANN, running
from tests.tiny_models import write_tiny_model

pytestmark = needs_browser


def test_states_are_saved_marked_rewound_forked_moved_and_deleted(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with (
        running(model, tmp_path / "states") as server,
        below("/some/path", server.base_url) as address,
        page_at(f"{address}/", **PHONE, accept_downloads=True) as page,
    ):
        give_key(page, ANN)
        open_cards(page)
        page.fill("[name=max_tokens]", "5")
        close_drawer(page)
        ask(page, "Hé?")
        answer_dialog(page, "#place >> text=Save as state", "trip")
        answer_dialog(page, "#place >> text=Mark this point", "here")
        open_cards(page)
        sizes = page.locator("#states li.current .sizes")
        tokens = sizes.inner_text()
        page.locator("[aria-label='Rewind to here']").wait_for()
        close_drawer(page)
        ask(page, "And?")
        expect(sizes).not_to_have_text(tokens)
        open_cards(page)
        page.click("[aria-label='Rewind to here']")
        expect(sizes).to_have_text(tokens)
        expect(page.locator(".turn")).to_have_count(2)
        close_drawer(page)
        answer_dialog(page, "#place >> text=Fork", "branch")
        expect(page.locator("#talks li.current .name")).to_have_text("branch")
        open_cards(page)
        page.locator("#states li.current >> text=branch").wait_for()
        with page.expect_download() as download:
            page.click("[aria-label='Export: branch']")
        assert download.value.suggested_filename == "branch.safetensors"
        page.set_input_files("#states-file", download.value.path())
        page.fill("#asker[open] #asker-value", "moved")
        page.click("#asker-ok")
        expect(page.locator("#log")).to_contain_text("are remembered")
        ask(page, "Still there?")
        expect(page.locator(".turn.assistant >> text=Regenerate")).to_be_disabled()
        open_cards(page)
        page.click("#states >> [aria-label='Delete: moved']")
        expect(page.locator("#states")).not_to_contain_text("moved")
        page.click("#toasts >> text=Undo")
        expect(page.locator("#states")).to_contain_text("moved")
        page.click("[aria-label='Continue: trip']")
        expect(page.locator("#talks li.current .name")).to_have_text("trip")
        page.reload()
        expect(page.locator("#place")).to_contain_text("State trip")
        assert ANN not in page.url
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone need not scroll sideways"


def test_tokens_are_rated_and_another_one_is_taken_by_its_id(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with running(model, tmp_path / "states") as server, page_at(server.base_url) as page:
        give_key(page, ANN)
        page.click("#tab-tokens")
        open_cards(page)
        page.fill("[name=max_tokens]", "6")
        page.fill("#prompt", ATTACKS)
        page.click("#score")
        expect(page.locator(".token")).to_have_count(len(ATTACKS))
        is_unharmed(page)
        page.fill("#prompt", "")
        expect(page.locator("#complete")).to_be_disabled()
        page.fill("#prompt", "aé")  # of three tokens here: half characters have ids too
        page.click("#complete:not([disabled])")
        expect(page.locator(".token")).to_have_count(9)
        expect(page.locator("#complete")).to_be_enabled()
        page.focus("#tokens")
        for _ in range(2):
            page.keyboard.press("ArrowRight")
        assert page.get_attribute("#tokens", "aria-activedescendant") == "token-2"
        expect(page.locator("#details caption")).to_contain_text("id 169")
        with page.expect_request("**/v1/completions") as request:
            page.keyboard.press("Enter")  # continues with the most likely other
        prompt = request.value.post_data_json["prompt"]
        assert prompt[:2] == [97, 195]
        assert len(prompt) == 3
        assert prompt[2] != 169
        expect(page.locator("#complete")).to_be_enabled()
        expect(page.locator(".token")).to_have_count(9)
