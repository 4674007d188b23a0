"""What a person has written is never lost: reload, new tab, two tabs, kill of the browser and of the server."""

import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port
from tests.server.conftest import Loopback
from tests.server.playground.browser import (
    ask,
    begin,
    browser_at,
    ended,
    expect,
    name_of_download,
    needs_browser,
    open_cards,
    page_at,
    profile_at,
    said,
    shows,
)
from tests.server.playground.scripted_server import HELD_AFTER, WORDS, scripted
from tests.server.tools.test_tools import say
from tests.waiting import PATIENCE_S, until

pytestmark = needs_browser
CURRENT = "#talks li.current"


def test_conversations_outlive_a_reload_and_are_in_new_tabs(server: Loopback) -> None:
    with browser_at(server.url) as browser:
        page = browser.page()
        say(server, "First answer.")
        ask(page, "First question")
        page.fill("#question", "half a thou")
        page.reload()
        shows(page, "First question", "First answer.")
        expect(page.locator("#question")).to_have_value("half a thou")
        page.click("#new")
        expect(page.locator(".turn")).to_have_count(0)
        say(server, "Second answer.")
        ask(page, "Second question")
        page.go_back()
        expect(page.locator(".turn")).to_have_count(0)
        page.go_back()
        shows(page, "First question", "First answer.")
        other = browser.page()
        expect(other.locator("#talks li")).to_have_count(2)
        other.click("text=Second question")
        shows(other, "Second question", "Second answer.")


def test_two_tabs_in_one_conversation_do_not_overwrite_one_another(server: Loopback) -> None:
    with browser_at(server.url) as browser:
        left = browser.page()
        say(server, "Hello.")
        ask(left, "Hi")
        right = browser.page("/" + left.evaluate("location.hash"))
        expect(right.locator(".turn")).to_have_count(2)
        say(server, "To the left.")
        ask(left, "From the left")
        expect(right.locator("#talks li")).to_have_count(1)
        say(server, "To the right.")
        ask(right, "From the right")
        left.reload()
        shows(left, "Hi", "Hello.", "From the right", "To the right.")
        left.click("[aria-label='Previous version']:enabled")
        shows(left, "Hi", "Hello.", "From the left", "To the left.")


def test_a_server_killed_in_mid_answer_takes_nothing_with_it(tmp_path: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    begun = WORDS[:HELD_AFTER].strip()
    with browser_at(address) as browser:
        with scripted(port, tmp_path) as process:
            page = browser.page()
            begin(page, "Count the words")
            expect(page.locator(".turn.assistant .said")).to_have_text(begun)
            process.send_signal(signal.SIGKILL)
            expect(page.locator(".turn.assistant .note")).to_contain_text("connection ended")
            shows(page, "Count the words", begun)
            expect(page.locator("#waiting")).to_contain_text("cannot be reached")
            for button in ("#send", "text=Continue", "text=Regenerate", "text=Edit"):
                expect(page.locator(f"#panel-chat >> {button}")).to_be_disabled()
        (tmp_path / "go").touch()
        with scripted(port, tmp_path):
            page.reload()
            shows(page, "Count the words", begun)
            page.click("#panel-chat >> text=Continue")
            ended(page)
            shows(page, "Count the words", WORDS)
            expect(page.locator(".turn.assistant .note")).to_have_count(0)


def test_a_page_that_is_reloaded_in_mid_answer_keeps_it_and_goes_on(tmp_path: Path) -> None:
    port = free_port()
    with scripted(port, tmp_path), page_at(f"http://127.0.0.1:{port}") as page:
        begin(page, "Count the words")
        expect(page.locator(".turn.assistant .said")).to_have_text(WORDS[:HELD_AFTER].strip())
        page.wait_for_timeout(300)  # it is stored every quarter of a second
        page.reload()
        expect(page.locator(".turn.assistant .note")).to_contain_text("page was closed")
        (tmp_path / "go").touch()
        begun = said(page)[1]
        assert begun
        assert WORDS.startswith(begun)
        page.click("#panel-chat >> text=Continue")
        ended(page)
        assert said(page)[1].startswith(begun)


def test_a_browser_that_is_killed_forgets_nothing(server: Loopback, tmp_path: Path) -> None:
    say(server, "It is kept.")
    with profile_at(tmp_path / "profile", server.url) as browser:
        page = browser.page()
        ask(page, "Is this kept?")
        page.fill("#question", "half a thought")
        other = browser.page()
        other.fill("#question", "another one")
        open_cards(other)
        other.fill("#system", "Be brief.")
        expect_stored(other, "half a thought", "another one")
        processes = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(tmp_path / "profile") in argument for argument in process.info["cmdline"] or ())
        ]
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # its parent has gone before it
                process.kill()
        psutil.wait_procs(processes, PATIENCE_S)
        if not page.is_closed():
            page.wait_for_event("close")
    with profile_at(tmp_path / "profile", server.url) as browser:
        page = browser.page()
        expect(page.locator("#question")).to_have_value("another one")
        expect(page.locator("#system")).to_have_value("Be brief.")
        page.click("#talks >> text=Is this kept?")
        shows(page, "Is this kept?", "It is kept.")
        expect(page.locator("#question")).to_have_value("half a thought")
        say(server, "So is this.")
        ask(page, "The whole thought")
        page.reload()
        shows(page, "Is this kept?", "It is kept.", "The whole thought", "So is this.")
        expect(page.locator("#question")).to_have_value("")
        page.click("#new")
        expect(page.locator("#question")).to_have_value("another one")


def test_a_new_conversation_is_there_at_once(server: Loopback) -> None:
    with page_at(server.url) as page:
        say(server, "An answer.")
        ask(page, "A question")
        turns = page.evaluate(
            "() => (document.getElementById('new').click(), document.querySelectorAll('.turn').length)"
        )
        assert turns == 0


def test_the_conversation_chosen_last_is_shown_however_long_another_takes(server: Loopback) -> None:
    with page_at(server.url) as page:
        for question in ("About cats", "About dogs"):
            say(server, "Yes.")
            page.click("#new")
            ask(page, question)
        expect(page.locator("#talks .name")).to_have_text(["About dogs", "About cats"])
        page.evaluate("""() => {
            const [dogs, cats] = [...document.querySelectorAll("#talks .name")];
            cats.click();
            dogs.click();
            cats.click();
            document.getElementById("new").click();
        }""")
        page.wait_for_timeout(300)
        expect(page.locator(".turn")).to_have_count(0)
        page.evaluate("""() => {
            const [dogs, cats] = [...document.querySelectorAll("#talks .name")];
            document.getElementById("new").click();
            cats.click();
            dogs.click();
        }""")
        shows(page, "About dogs", "Yes.")


def expect_stored(page: Any, *texts: str) -> None:
    """Waits until the browser has them as drafts."""
    stored = """async () => {
        const request = indexedDB.open("dijiang");
        await new Promise((done) => (request.onsuccess = done));
        const all = request.result.transaction("settings").objectStore("settings").getAll();
        await new Promise((done) => (all.onsuccess = done));
        request.result.close();
        return all.result.filter((value) => typeof value === "string");
    }"""
    until(lambda: {*texts} <= {*page.evaluate(stored)})


def test_a_draft_belongs_to_the_tab_in_which_it_is_typed(server: Loopback) -> None:
    with browser_at(server.url) as browser:
        left, right = browser.page(), browser.page()
        left.fill("#question", "to the left")
        right.fill("#question", "to the right")
        for page, text in ((left, "to the left"), (right, "to the right"), (left, "to the left")):
            page.reload()
            expect(page.locator("#question")).to_have_value(text)
        third = browser.page()
        expect(third.locator("#question")).to_have_value("")
        expect_stored(left, "to the left", "to the right")
        right.close()
        fourth = browser.page()
        expect(fourth.locator("#question")).to_have_value("to the right")


def test_what_a_message_is_being_changed_to_outlives_a_reload(server: Loopback) -> None:
    with page_at(server.url) as page:
        say(server, "One.")
        ask(page, "Question")
        page.click(".turn.user >> text=Edit")
        page.fill(".editor textarea", "Another ques")
        expect_stored(page, "Another ques")
        page.reload()
        editor = page.locator(".editor textarea")
        expect(editor).to_have_value("Another ques")
        page.fill(".editor textarea", "Another question")
        say(server, "Two.")
        page.press(".editor textarea", "Enter")
        shows(page, "Another question", "Two.")  # the answer before has ended already
        ended(page)
        page.reload()
        shows(page, "Another question", "Two.")
        page.click(".turn.user >> text=Edit")
        page.fill(".editor textarea", "Never mind")
        page.press(".editor textarea", "Escape")
        page.reload()
        shows(page, "Another question", "Two.")
        expect(editor).to_have_count(0)


def test_conversations_are_found_renamed_deleted_and_brought_back(server: Loopback) -> None:
    with page_at(server.url) as page:
        for question, answer in (("About cats", "They purr."), ("About dogs", "They bark.")):
            say(server, answer)
            page.click("#new")
            ask(page, question)
        page.fill("#search", "PURR")
        expect(page.locator("#talks li")).to_contain_text(["About cats"])
        page.fill("#search", "nothing like it")
        expect(page.locator("#talks")).to_have_text("Nothing is found.")
        page.fill("#search", "")
        page.click("#talks >> text=Rename")
        page.fill("#asker-value", "Barking")
        page.click("#asker-ok")
        expect(page.locator(f"{CURRENT} .name")).to_have_text("Barking")
        page.click("#talks >> text=Delete")
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.locator("#talks li")).to_have_count(1)
        page.reload()  # the offer is gone with the page, and so is the conversation
        expect(page.locator("#talks li")).to_have_count(1)
        page.click("#talks >> text=About cats")
        page.click("#talks >> text=Delete")
        expect(page.locator("#talks li")).to_have_text("None yet: what you say is kept here.")
        page.click("#toasts >> text=Undo")
        expect(page.locator(f"{CURRENT} .name")).to_have_text("About cats")
        shows(page, "About cats", "They purr.")


def test_conversations_are_taken_out_and_in_as_text(server: Loopback, tmp_path: Path) -> None:
    with page_at(server.url, accept_downloads=True) as page:
        say(server, "One.\n\n## Model\n\n```py\nx = 1\n```")
        ask(page, "Ünïcode?")
        say(server, "Two.")
        page.click("text=Regenerate")
        ended(page)
        expect(page.locator(".versions")).to_have_text("2 / 2")
        files = [name_of_download(page, f"#talks >> text={kind}") for kind in ("Markdown", "JSON")]
        files.append(name_of_download(page, "#talks-export"))
        assert [name for name, _ in files] == ["Ünïcode_.md", "Ünïcode_.json", "conversations.json"]
        for number, (name, path) in enumerate(files):
            copy = tmp_path / name
            copy.write_bytes(path.read_bytes())
            page.set_input_files("#talks-file", copy)
            expect(page.locator("#talks li")).to_have_count(2 + number)
            expect(page.locator(".turn")).to_have_count(2)
            shows(page, "Ünïcode?", "Two.")
            expect(page.locator(".versions")).to_have_count(0 if name.endswith("md") else 1)
        bad = tmp_path / "bad.json"
        bad.write_text("{}")
        page.set_input_files("#talks-file", bad)
        expect(page.locator("#talks-error")).to_contain_text("neither")
