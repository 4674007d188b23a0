"""Two keys over a real socket: what one saves is bounded, and costs the other nothing; bad files are told at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import ANN, BOB, Running, bearer, running

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
FILE = {"content-type": "application/octet-stream", **bearer(ANN)}
FULL = (507, "state_storage_full")
BUDGET = 512 << 10
"""Of each of two keys that share 1 MiB."""


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """Options of a server for each kind of store."""
    if request.param == "sqlite":
        yield ()
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    yield ("--state-store", postgres.url, "--state-store-schema", "test_owners")
    postgres.ask("DROP SCHEMA test_owners CASCADE")


def until_full(server: Running, path: str, **body: object) -> str:
    """Asks again and again until there is no room; the advice."""
    for _ in range(2_000):
        answer = server.http.post(path, json=body)
        if answer.status_code != 200:
            break
    assert (answer.status_code, answer.json()["error"]["code"]) == FULL, answer.text
    return str(answer.json()["error"]["message"])


def test_a_key_over_its_budget_is_told_what_to_do_and_anothers_state_stays(
    tiny: Path, tmp_path: Path, store: tuple[str, ...]
) -> None:
    limits = ("--states-disk", "1MiB", "--states-eviction", "refuse", *store)
    with running(tiny, tmp_path / "states", *limits) as server:
        saved = server.complete(TEXT, key=BOB, return_state={"name": "bobs", "ttl_s": 3600})
        expected = server.complete(" Go on.", key=BOB, state_id=saved["state_id"])["token_ids"]
        mine = server.complete(TEXT, return_state=True)["state_id"]
        content = server.http.get(f"/v1/states/{mine}/export").content
        told = until_full(server, "/v1/completions", prompt="x", max_tokens=1, return_state=True)
        assert f"{BUDGET:,} bytes" in told
        assert "DELETE /v1/states/{id}" in told
        assert "ttl_s" in told
        assert server.refused("POST", "/v1/states", json={"prompt": "x"})[:2] == FULL
        for _ in range(200):  # the file has its size, which is less than what is kept free for one to be written
            imported = server.http.post("/v1/states/import", content=content, headers=FILE)
            if imported.status_code != 200:
                break
        assert (imported.status_code, imported.json()["error"]["code"]) == FULL
        until_full(server, f"/v1/states/{mine}/fork", ttl_s=3600)
        assert server.refused("POST", f"/v1/states/{mine}/points", json={"name": "here"})[:2] == FULL
        assert server.refused("POST", "/v1/conversations", json={"metadata": {"a": "b" * 500}})[:2] == FULL
        assert server.refused("POST", "/v1/responses", json={"input": "x", "max_output_tokens": 1})[:2] == FULL
        assert server.http.get(f"/v1/states/{mine}/export").content == content
        (theirs,) = server.get("/v1/states?name=bobs", key=BOB)["data"]
        assert theirs["id"] == saved["state_id"]
        assert server.complete(" Go on.", key=BOB, state_id=theirs["id"], return_state=True)["token_ids"] == expected
        for state in server.get("/v1/states?limit=100")["data"]:
            if state["id"] != mine:
                assert server.http.delete(f"/v1/states/{state['id']}").status_code == 200
        assert server.complete(TEXT, return_state=True)["state_id"]


def test_what_a_response_repeats_counts_against_its_owner(tiny: Path, tmp_path: Path, store: tuple[str, ...]) -> None:
    with running(tiny, tmp_path / "states", "--states-disk", "1MiB", *store) as server:
        saved = server.complete(TEXT, key=BOB, return_state={"name": "bobs", "ttl_s": 3600})["state_id"]
        long = {"input": "x", "instructions": "word " * 25_000, "max_output_tokens": 1}
        for field in ("user", "safety_identifier", "prompt_cache_key"):
            assert server.refused("POST", "/v1/responses", json={"input": "x", field: "u" * 513})[::2] == (400, field)
        ids = [server.post("/v1/responses", **long)["id"] for _ in range(6)]
        found = [server.http.get(f"/v1/responses/{name}").status_code for name in ids]
        assert found[0] == 404, "the oldest has made room for the others"
        assert found[-1] == 200
        assert found.count(200) * 125_000 <= BUDGET
        assert server.get(f"/v1/states/{saved}", key=BOB)["name"] == "bobs"
        too_long = {**long, "instructions": "w" * (BUDGET + 1)}
        answer = server.post("/v1/responses", **too_long)  # which is not thrown away
        assert answer["state_error"]["code"] == FULL[1]
        assert server.http.get(f"/v1/responses/{answer['id']}").status_code == 404


@pytest.mark.parametrize("harm", ["changed", "cut off", "longer", "empty", "gone"])
def test_a_bad_file_is_told_before_the_first_byte_of_an_export(tiny: Path, tmp_path: Path, harm: str) -> None:
    with running(tiny, tmp_path / "states") as server:
        state = server.complete(TEXT, return_state=True)["state_id"]
        server.post(f"/v1/states/{state}/points", name="here")
        fork = server.post(f"/v1/states/{state}/fork")["id"]
        (path,) = (tmp_path / "states" / "files").iterdir()
        content = path.read_bytes()
        harmed = {
            "changed": content[:-9] + bytes([content[-9] ^ 0x40]) + content[-8:],
            "cut off": content[:-100],
            "longer": content + b"x" * 10,
            "empty": b"",
        }
        path.unlink()
        if harm != "gone":
            path.write_bytes(harmed[harm])
        expected = (404, "state_not_found") if harm == "gone" else (400, "state_invalid")
        for export in (f"{state}/export", f"{state}/export?point=here", f"{fork}/export"):
            answer = server.http.get(f"/v1/states/{export}")
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == expected
            assert path.name not in error["message"], "files are nobody's business"
            assert server.http.head(f"/v1/states/{export}").status_code == expected[0]
        body = {"prompt": "x", "state_id": fork, "cache_prompt": False}
        assert server.refused("POST", "/v1/completions", json=body) == (*expected, "state_id")
        assert {item["id"] for item in server.get("/v1/states")["data"]} == {state, fork}
        path.write_bytes(content)
        assert server.http.get(f"/v1/states/{state}/export").content == content


def test_bad_content_in_a_shared_store_is_told_before_the_first_byte_too(
    tiny: Path, tmp_path: Path, postgres: PostgresServer
) -> None:
    schema = "test_exports"
    options = ("--state-store", postgres.url, "--state-store-schema", schema)
    try:
        with running(tiny, tmp_path / "one", *options) as server:
            states = [server.complete(f"{number}. {TEXT}", return_state=True)["state_id"] for number in range(3)]
        changed, cut, gone = (
            postgres.ask(f"SELECT head FROM {schema}.states WHERE id = %s", state)[0][0] for state in states
        )
        data = "set_byte(data, 5000, 255 - get_byte(data, 5000))"
        postgres.ask(f"UPDATE {schema}.chunks SET data = {data} WHERE file = %s AND number = 0", changed)
        postgres.ask(f"UPDATE {schema}.chunks SET data = substr(data, 1, 3000) WHERE file = %s", cut)
        postgres.ask(f"DELETE FROM {schema}.chunks WHERE file = %s", gone)
        with running(tiny, tmp_path / "two", *options) as server:
            paths = [f"/v1/states/{state}/export" for state in states]
            assert server.refused("GET", paths[0])[:2] == (400, "state_invalid")
            assert server.refused("GET", paths[1])[0] in (400, 404)
            assert server.refused("GET", paths[2])[:2] == (404, "state_not_found")
    finally:
        postgres.ask(f"DROP SCHEMA {schema} CASCADE")
