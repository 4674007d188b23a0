"""A long conversation outlives `kill -9` of the whole service; what a kill leaves half done is swept."""

import threading
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.states.running import Running, bearer, cached, running, start
from tests.waiting import PATIENCE_S, until

NUM_TOKENS = 30_000


def long_talk() -> list[int]:
    """Bytes that are no pattern."""
    value, tokens = 1, []
    for _ in range(NUM_TOKENS):
        value = value * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        tokens.append(32 + (value >> 16) % 90)
    return tokens


def test_a_long_conversation_goes_on_after_a_kill_as_if_undisturbed(tiny: Path, tmp_path: Path) -> None:
    first_server = start(tiny, tmp_path / "states")
    try:
        first = first_server.complete(long_talk(), max_tokens=20, return_state={"name": "talk"})
        undisturbed = first_server.chat(("user", "Go on."), state_id=first["state_id"], max_tokens=40)
    finally:
        first_server.kill()
        first_server.close()
    with running(tiny, tmp_path / "states") as second_server:
        (state,) = second_server.get("/v1/states?name=talk")["data"]
        assert (state["id"], state["num_tokens"]) == (first["state_id"], NUM_TOKENS + 20)
        before = second_server.gauge("dijiang_engine_prefill_tokens_total")
        second = second_server.chat(("user", "Go on."), state_id=state["id"], max_tokens=40)
        num_new = len(second["prompt_token_ids"])
        assert second_server.gauge("dijiang_engine_prefill_tokens_total") - before == num_new + 1
        assert second["usage"]["prompt_tokens"] == NUM_TOKENS + 20 + num_new
        assert cached(second["usage"]) == NUM_TOKENS + 20 - 1
        assert second["token_ids"] == undisturbed["token_ids"]


def test_a_kill_while_states_are_saved_leaves_whole_states_or_none(tiny: Path, tmp_path: Path) -> None:
    server = start(tiny, tmp_path / "states")
    stop = threading.Event()
    kept: list[str] = []

    def save_on_and_on() -> None:
        with httpx.Client(
            base_url=server.base_url, headers=bearer("key-of-ann"), timeout=PATIENCE_S, trust_env=False
        ) as http:
            while not stop.is_set():
                try:
                    answer = http.post("/v1/states", json={"prompt": "Some text to be kept."})
                except httpx.TransportError:
                    return
                kept.append(answer.json()["id"])

    threads = [threading.Thread(target=save_on_and_on) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        until(lambda: len(kept) >= 20)
    finally:
        server.kill()
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        server.close()
    with running(tiny, tmp_path / "states") as again:
        assert {*kept} <= all_ids(again)
        files = [path.name for path in (tmp_path / "states" / "files").iterdir()]
        assert len(files) == len(all_ids(again))
        expected = again.complete("Some text to be kept.!", cache_prompt=False)["token_ids"]
        for state_id in all_ids(again):
            assert again.complete("!", state_id=state_id)["token_ids"] == expected


def test_a_dying_engine_leaves_states_untouched(tiny: Path, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "states") as server:
        state = server.post("/v1/states", prompt="Before the fall.")
        answer = server.complete(" After.", state_id=state["id"])
        for child in children_of(server):
            child.kill()
        until(lambda: server.http.get("/health").json()["engine_restarts"] == 1)
        until(lambda: server.http.get("/ready").status_code == 200)
        assert server.complete(" After.", state_id=state["id"])["token_ids"] == answer["token_ids"]


def test_two_servers_do_not_share_a_folder(tiny: Path, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "states"), pytest.raises(AssertionError, match="another server uses the states"):
        start(tiny, tmp_path / "states").close()


def all_ids(server: Running) -> set[str]:
    """Page by page."""
    ids: set[str] = set()
    page = server.get("/v1/states?limit=7")
    while True:
        ids |= {state["id"] for state in page["data"]}
        if not page["has_more"]:
            return ids
        page = server.get(f"/v1/states?limit=7&after={page['last_id']}")


def children_of(server: Running) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()
