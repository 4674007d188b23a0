"""States over HTTP, on a real server with a tiny model: continuation is exact, and nobody else's business."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load, save

from tests.server.states.running import ANN, BOB, Running, bearer, cached, running
from tests.tiny_models import write_tiny_model

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
TALK = (("system", "You answer briefly and you never make anything up."), ("user", "Where is Paris?"))


def saved(server: Running, prompt: str = TEXT, **more: object) -> dict:
    return server.complete(prompt, return_state=True, **more)


def test_a_completion_goes_on_from_its_state_as_if_undisturbed(server: Running) -> None:
    first = saved(server)
    second = server.complete(" And then", state_id=first["state_id"])
    tokens = [*TEXT.encode(), *first["token_ids"], *b" And then"]
    assert second["token_ids"] == server.complete(tokens, cache_prompt=False)["token_ids"]
    assert second["usage"]["prompt_tokens"] == len(tokens)
    assert second["usage"]["prompt_tokens"] - cached(second["usage"]) == len(" And then") + 1


def test_only_new_tokens_are_computed(server: Running) -> None:
    first = saved(server)
    before = server.gauge("dijiang_engine_prefill_tokens_total")
    server.complete("abc", state_id=first["state_id"], max_tokens=1)
    assert server.gauge("dijiang_engine_prefill_tokens_total") - before == 3 + 1


def test_an_answer_that_was_cut_off_goes_on_without_a_prompt(server: Running) -> None:
    whole = server.complete(TEXT, max_tokens=20)
    first = saved(server, max_tokens=12)
    rest = server.complete(None, state_id=first["state_id"])
    assert first["token_ids"] + rest["token_ids"] == whole["token_ids"]


def test_chat_goes_on_with_new_messages_alone(server: Running) -> None:
    first = server.chat(*TALK, return_state=True)
    question = ("user", "And Rome?")
    second = server.chat(question, state_id=first["state_id"])
    past = [*first["prompt_token_ids"], *first["token_ids"]]
    whole = server.complete([*past, *second["prompt_token_ids"]], cache_prompt=False, ignore_eos=False)
    assert second["token_ids"] == whole["token_ids"]
    assert bytes(token for token in second["prompt_token_ids"] if token < 256).startswith(b"\nuser\nAnd Rome?")
    assert second["usage"]["prompt_tokens"] == len(past) + len(second["prompt_token_ids"])


def test_a_stream_ends_with_the_state(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 5, "return_state": True}
    chunks = server.stream("/v1/chat/completions", **body)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    state_id = chunks[-1]["choices"][0]["state_id"]
    assert server.get(f"/v1/states/{state_id}")["num_tokens"] == 21 + 5
    completion = server.stream("/v1/completions", prompt="Hi", temperature=0, max_tokens=5, return_state=True)
    assert completion[-1]["choices"][0]["state_id"].startswith("state_")


def test_the_state_after_a_stop_string_holds_what_was_answered_and_no_more(server: Running) -> None:
    whole = server.complete(TEXT, max_tokens=30)
    text = whole["text"]
    stop = next(c for c in text[3:] if c.isprintable() and c != "�")
    first = saved(server, max_tokens=30, stop=[stop])
    assert first["finish_reason"] == "stop"
    record = server.get(f"/v1/states/{first['state_id']}")
    assert record["num_tokens"] == len(TEXT) + len(first["token_ids"])
    second = server.complete("!", state_id=first["state_id"])
    tokens = [*TEXT.encode(), *first["token_ids"], *b"!"]
    assert second["token_ids"] == server.complete(tokens, cache_prompt=False)["token_ids"]


def test_every_answer_of_many_has_its_own_state(server: Running) -> None:
    body = {"prompt": TEXT, "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 6, "return_state": True}
    answer = server.post("/v1/completions", **body, return_token_ids=True, ignore_eos=True)
    assert len({choice["state_id"] for choice in answer["choices"]}) == 3
    for choice in answer["choices"]:
        tokens = [*TEXT.encode(), *choice["token_ids"], *b"?"]
        expected = server.complete(tokens, cache_prompt=False)["token_ids"]
        assert server.complete("?", state_id=choice["state_id"])["token_ids"] == expected


def test_one_state_answers_many_at_once(server: Running) -> None:
    first = saved(server)
    prompts = ["a", "b", "a", "c"] * 3
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    answers = server.post("/v1/completions", state_id=first["state_id"], ignore_eos=True, **body)["choices"]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = server.complete(prompt, state_id=first["state_id"], max_tokens=6)
        assert alone["token_ids"] == answer["token_ids"]


def test_a_state_is_made_by_prefill_of_a_text(server: Running) -> None:
    state = server.post("/v1/states", prompt=TEXT, name="prefilled text")
    assert (state["object"], state["num_tokens"], state["num_pending_tokens"]) == ("state", len(TEXT), 0)
    assert state["usage"]["completion_tokens"] == 0
    went_on = server.complete("So", state_id=state["id"])
    assert went_on["token_ids"] == server.complete(TEXT + "So", cache_prompt=False)["token_ids"]
    longer = server.post("/v1/states", prompt="So", state_id=state["id"])
    assert (longer["num_tokens"], longer["parent_id"]) == (len(TEXT) + 2, state["id"])


def test_a_state_is_made_by_prefill_of_messages(server: Running) -> None:
    messages = [{"role": role, "content": content} for role, content in TALK]
    state = server.post("/v1/states", messages=messages)
    went_on = server.chat(("user", "And Rome?"), state_id=state["id"])
    whole = server.chat(*TALK, ("user", "And Rome?"), cache_prompt=False)
    assert went_on["token_ids"] == whole["token_ids"]
    assert went_on["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_states_are_listed_got_and_deleted(server: Running) -> None:
    saved(server)
    answer = server.complete(TEXT, return_state={"name": "listed", "ttl_s": 60})
    state = server.get(f"/v1/states/{answer['state_id']}")
    assert (state["name"], state["expires_at"] - state["last_used_at"]) == ("listed", 60)
    page = server.get("/v1/states?name=listed")
    assert [item["id"] for item in page["data"]] == [state["id"]]
    assert server.get("/v1/states?limit=1")["has_more"]
    gone = server.http.delete(f"/v1/states/{state['id']}").json()
    assert gone == {"id": state["id"], "object": "state", "deleted": True}
    assert server.refused("GET", f"/v1/states/{state['id']}") == (404, "state_not_found", "state_id")
    body = {"prompt": "x", "state_id": state["id"]}
    assert server.refused("POST", "/v1/completions", json=body) == (404, "state_not_found", "state_id")


def test_a_state_advances_in_place_and_goes_back_to_a_point(server: Running) -> None:
    state = server.post("/v1/states", prompt=TEXT)
    server.post(f"/v1/states/{state['id']}/points", name="before")
    first = server.complete("One", state_id=state["id"], return_state={"update": True})
    assert first["state_id"] == state["id"]
    now = server.get(f"/v1/states/{state['id']}")
    assert now["num_tokens"] == len(TEXT) + 3 + 8
    assert [point["num_tokens"] for point in now["points"]] == [len(TEXT)]
    back = server.post(f"/v1/states/{state['id']}/rewind", point="before")
    assert back["num_tokens"] == len(TEXT)
    assert server.complete("One", state_id=state["id"])["token_ids"] == first["token_ids"]
    refused = server.refused("POST", f"/v1/states/{state['id']}/rewind", json={"point": "never"})
    assert refused == (404, "point_not_found", "point")


def test_forks_go_their_own_ways(server: Running) -> None:
    state = server.post("/v1/states", prompt=TEXT)
    fork = server.post(f"/v1/states/{state['id']}/fork", name="the other way")
    assert (fork["parent_id"], fork["name"], fork["num_tokens"]) == (state["id"], "the other way", len(TEXT))
    server.complete("Left", state_id=fork["id"], return_state={"update": True})
    assert server.get(f"/v1/states/{state['id']}")["num_tokens"] == len(TEXT)
    server.http.delete(f"/v1/states/{state['id']}")
    assert server.get(f"/v1/states/{fork['id']}")["num_tokens"] == len(TEXT) + 4 + 8


def test_another_owner_sees_nothing(server: Running) -> None:
    state_id = saved(server)["state_id"]
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/export")):
        assert server.refused(method, f"/v1/states/{state_id}{path}", BOB)[:2] == (404, "state_not_found")
    for path, body in (("fork", {}), ("points", {"name": "p"}), ("rewind", {"point": "p"})):
        assert server.refused("POST", f"/v1/states/{state_id}/{path}", BOB, json=body)[1] == "state_not_found"
    used = {"prompt": "x", "state_id": state_id}
    assert server.refused("POST", "/v1/completions", BOB, json=used) == (404, "state_not_found", "state_id")
    assert state_id not in {item["id"] for item in server.get("/v1/states?limit=100", BOB)["data"]}
    assert server.get(f"/v1/states/{state_id}")["id"] == state_id


@pytest.mark.parametrize("state_id", ["../../etc/passwd", "..%2f..%2fstates.db", "state_00", "%00", "a" * 101, "'--"])
def test_guessed_and_crooked_ids_are_clean_errors(server: Running, state_id: str) -> None:
    assert server.refused("GET", f"/v1/states/{state_id}")[0] in (400, 404)
    body = {"prompt": "x", "state_id": state_id}
    assert server.refused("POST", "/v1/completions", json=body)[0] in (400, 404)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"state_id": ""}, "state_id"),
        ({"state_id": 5}, "state_id"),
        ({"return_state": "yes"}, "return_state"),
        ({"return_state": {"ttl_s": 0}}, "return_state.ttl_s"),
        ({"return_state": {"name": ""}}, "return_state.name"),
        ({"return_state": {"name": "a\nb"}}, "return_state.name"),
        ({"return_state": {"update": True}}, "return_state"),
        ({"return_state": {"name": "two"}, "n": 2}, "return_state"),
        ({"cache_salt": "s", "cache_prompt": False}, "cache_salt"),
        ({"cache_prompt": "no"}, "cache_prompt"),
    ],
)
def test_bad_state_fields_are_400s_that_name_them(server: Running, body: dict, param: str) -> None:
    status, _, named = server.refused("POST", "/v1/completions", json={"prompt": "x", **body})
    assert (status, named) == (400, param)


def test_a_penalty_on_tokens_nobody_remembers_is_refused(server: Running) -> None:
    body = {"prompt": "x", "state_id": saved(server)["state_id"], "repetition_penalty": 1.3}
    assert server.refused("POST", "/v1/completions", json=body) == (400, "unsupported_parameter", "repetition_penalty")


def test_creating_needs_exactly_one_input(server: Running) -> None:
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, {"prompt": ["a", "b"]}):
        assert server.refused("POST", "/v1/states", json=body)[::2] == (400, "prompt")


def test_a_taken_name_is_a_conflict_that_clients_do_not_retry(server: Running) -> None:
    server.post("/v1/states", prompt=TEXT, name="taken")
    before = server.gauge("dijiang_engine_prefill_tokens_total")
    body = {"prompt": "x", "return_state": {"name": "taken"}}
    assert server.refused("POST", "/v1/completions", json=body) == (409, "state_name_taken", "name")
    assert server.gauge("dijiang_engine_prefill_tokens_total") == before
    response = server.http.post("/v1/states", json={"prompt": TEXT, "name": "taken"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "state_name_taken")
    assert response.headers["x-should-retry"] == "false"
    assert server.post("/v1/states", BOB, prompt=TEXT, name="taken")["name"] == "taken"


def exported(server: Running, state_id: str) -> bytes:
    response = server.http.get(f"/v1/states/{state_id}/export")
    assert response.status_code == 200
    assert response.headers["content-disposition"] == f'attachment; filename="{state_id}.safetensors"'
    return response.content


def put(server: Running, content: bytes, key: str = ANN, **query: str) -> tuple[int, dict]:
    headers = {**bearer(key), "content-type": "application/octet-stream"}
    response = server.http.post("/v1/states/import", content=content, params=query, headers=headers)
    return response.status_code, response.json()


@pytest.fixture(scope="module")
def elsewhere(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny, tmp_path_factory.mktemp("states") / "elsewhere") as server:
        yield server


def test_a_state_goes_on_elsewhere_as_it_would_have_here(server: Running, elsewhere: Running) -> None:
    first = server.chat(*TALK, return_state=True)
    content = exported(server, first["state_id"])
    status, state = put(elsewhere, content, name="travelled")
    assert (status, state["name"]) == (200, "travelled")
    assert exported(elsewhere, state["id"]) == content
    question = ("user", "And Rome?")
    there, here = (
        place.chat(question, state_id=state_id, max_tokens=30)
        for place, state_id in ((elsewhere, state["id"]), (server, first["state_id"]))
    )
    assert (there["token_ids"], there["prompt_token_ids"]) == (here["token_ids"], here["prompt_token_ids"])


def test_a_state_of_another_model_is_refused(server: Running, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=7)
    with running(other, tmp_path_factory.mktemp("states") / "other") as stranger:
        content = exported(stranger, saved(stranger)["state_id"])
    status, body = put(server, content)
    assert (status, body["error"]["code"]) == (400, "state_of_another_model")


def test_damaged_files_are_refused(server: Running) -> None:
    content = exported(server, saved(server)["state_id"])
    changed = bytearray(content)
    changed[len(content) // 2] ^= 0x10
    for broken in (bytes(changed), content[:-1], content + b"\0", b"", b"\x80\x04K\x01.", b"PK\x03\x04"):
        status, body = put(server, broken)
        assert (status, body["error"]["code"]) == (400, "state_invalid"), broken[:20]


def test_nan_is_refused_even_with_the_right_names(server: Running) -> None:
    content = exported(server, saved(server)["state_id"])
    tensors = load(content)
    tensors["layers.0.linear_state"][0, 0, 0] = float("nan")
    status, body = put(server, save(tensors))
    assert (status, body["error"]["code"]) == (400, "state_invalid")


def test_imports_are_bounded_and_typed(server: Running) -> None:
    size = len(exported(server, saved(server)["state_id"]))
    status, body = put(server, b"\0" * (size + (5 << 20)))
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    refused = server.refused("POST", "/v1/states/import", json={"a": 1})
    assert refused[:2] == (415, "unsupported_media_type")


def test_a_file_damaged_on_the_disk_fails_that_request_alone(tiny: Path, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "damaged") as server:
        first, second = saved(server), saved(server, "Another text of some length, so that it is no short one.")
        files = sorted((tmp_path / "damaged" / "files").iterdir())
        for path in files:
            content = bytearray(path.read_bytes())
            content[-9] ^= 0x40
            path.write_bytes(content)
        body = {"prompt": "x", "state_id": first["state_id"], "cache_prompt": False}
        assert server.refused("POST", "/v1/completions", json=body) == (400, "state_invalid", "state_id")
        assert server.refused("GET", f"/v1/states/{first['state_id']}/export")[:2] == (400, "state_invalid")
        for path in files:
            path.unlink()
        body = {"prompt": "x", "state_id": second["state_id"], "cache_prompt": False}
        assert server.refused("POST", "/v1/completions", json=body) == (404, "state_not_found", "state_id")
        assert server.refused("GET", f"/v1/states/{second['state_id']}/export")[:2] == (404, "state_not_found")
        assert len(server.complete(TEXT)["token_ids"]) == 8


def test_a_full_store_that_may_not_evict_refuses_before_anything_is_computed(tiny: Path, tmp_path: Path) -> None:
    limits = ("--states-disk", "160KiB", "--states-eviction", "refuse")
    with running(tiny, tmp_path / "full", *limits) as server:  # two keys share it
        saved(server)
        before = server.gauge("dijiang_engine_prefill_tokens_total")
        body = {"prompt": "x", "return_state": True}
        assert server.refused("POST", "/v1/completions", json=body)[:2] == (507, "state_storage_full")
        assert server.gauge("dijiang_engine_prefill_tokens_total") == before
