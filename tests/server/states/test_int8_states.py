"""With `--state-dtype int8`, beside a window or anchors, whatever is done with states goes on as if undisturbed."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import ANN, Running, bearer, cached, running, start
from tests.tiny_models import anchored, llama_config, write_tiny_model
from tests.waiting import PATIENCE_S

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
FILE = {"content-type": "application/octet-stream", **bearer(ANN)}
INT8 = ("--state-dtype", "int8", "--admin-keys", "key-of-admin", "--max-conversations", "4")


@pytest.fixture(scope="module", params=["window", "anchors"])
def int8(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("int8")
    options = ("--prefix-cache-memory", "48KiB", "--prefix-cache-disk", "16MiB")
    if request.param == "anchors":
        tiny = write_tiny_model(folder / "anchors", llama_config(anchored(2), anchored(2)))
    with running(tiny, folder / "states", *INT8, *options) as server:
        yield server


def whole(server: Running, prompt: list[int], **more: Any) -> list[int]:
    """The tokens that an undisturbed reading gives."""
    tokens: list[int] = server.complete(prompt, cache_prompt=False, **more)["token_ids"]
    return tokens


def test_a_fork_and_its_origin_go_on_alike_and_apart(int8: Running) -> None:
    first = int8.complete(TEXT, return_state=True)
    fork = int8.post(f"/v1/states/{first['state_id']}/fork", name="int8 fork")
    past = [*TEXT.encode(), *first["token_ids"]]
    for state_id, more in ((first["state_id"], " And then"), (fork["id"], " But no")):
        went_on = int8.complete(more, state_id=state_id, return_state={"update": True})
        assert went_on["token_ids"] == whole(int8, [*past, *more.encode()])
        assert cached(went_on["usage"]) == len(past) - 1


def test_a_rewound_state_is_what_it_was(int8: Running) -> None:
    state_id = int8.complete(TEXT, return_state=True)["state_id"]
    point = int8.post(f"/v1/states/{state_id}/points", name="before")
    expected = int8.complete(" Go on.", state_id=state_id)["token_ids"]
    int8.complete(" Something else", state_id=state_id, return_state={"update": True})
    assert int8.complete(" Go on.", state_id=state_id)["token_ids"] != expected
    rewound = int8.post(f"/v1/states/{state_id}/rewind", point="before")
    assert rewound["num_tokens"] == point["num_tokens"]
    assert int8.complete(" Go on.", state_id=state_id)["token_ids"] == expected


def test_an_exported_state_goes_on_after_its_import_and_not_in_other_numbers(int8: Running, server: Running) -> None:
    state_id = int8.complete(TEXT, return_state=True)["state_id"]
    content = int8.http.get(f"/v1/states/{state_id}/export").content
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # numpy knows no BF16
    dtypes = {name.partition(".near_")[2]: part["dtype"] for name, part in header.items() if ".near_" in name}
    expected_dtypes = {"keys": "I8", "values": "I8", "key_scales": "F32", "value_scales": "F32"}
    if "positions" in dtypes:
        expected_dtypes |= {"positions": "I32", "scores": "F32"}
    assert dtypes == expected_dtypes
    answer = int8.http.post("/v1/states/import", content=content, headers=FILE)
    assert answer.status_code == 200, answer.text
    expected = int8.complete(" So", state_id=state_id)["token_ids"]
    assert int8.complete(" So", state_id=answer.json()["id"])["token_ids"] == expected
    assert server.http.post("/v1/states/import", content=content, headers=FILE).status_code == 400


def test_prefixes_come_back_from_the_disk(int8: Running) -> None:
    prompts = [f"{number}: {TEXT}" for number in range(12)]  # more than the memory holds
    first = [int8.complete(prompt) for prompt in prompts]
    again = [int8.complete(prompt) for prompt in prompts]
    assert [answer["token_ids"] for answer in again] == [answer["token_ids"] for answer in first]
    assert [cached(answer["usage"]) for answer in again] == [len(prompt) - 1 for prompt in prompts]


def test_the_selfcheck_finds_no_difference(int8: Running) -> None:
    answer = int8.http.post("/admin/selfcheck", json={"num_prompt_tokens": 60}, headers=bearer("key-of-admin"))
    report = answer.json()
    assert answer.status_code == 200, answer.text
    assert (report["passed"], report["largest_difference"]) == (True, 0.0)


@pytest.mark.slow
def test_a_stop_saves_what_runs_and_it_goes_on_in_int8(tiny: Path, tmp_path: Path) -> None:
    first = start(tiny, tmp_path / "states", "--drain-timeout-s", "0.1", *INT8)
    try:
        body = {"prompt": "The sea", "temperature": 0, "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        with first.http.stream("POST", "/v1/completions", json=body, headers=bearer(ANN)) as response:
            lines = response.iter_lines()
            next(lines)
            first.process.send_signal(signal.SIGTERM)
            error = [line for line in lines if '"error"' in line][-1]
        first.process.wait(PATIENCE_S)
    finally:
        first.kill()
        first.close()
    state_id = json.loads(error.removeprefix("data: "))["error"]["state_id"]
    with running(tiny, tmp_path / "states", *INT8) as again:
        state = again.get(f"/v1/states/{state_id}")
        after = again.complete(None, state_id=state_id, max_tokens=20)
        num_before = state["num_tokens"] - len("The sea")
        expected = again.complete("The sea", max_tokens=num_before + 20)["token_ids"]
        assert after["token_ids"] == expected[num_before:]


@pytest.mark.slow
def test_states_in_postgresql_go_on_after_a_kill(tiny: Path, postgres: PostgresServer, tmp_path: Path) -> None:
    options = (*INT8, "--state-store", postgres.url, "--state-store-schema", "test_int8")
    first = start(tiny, tmp_path / "one", *options)
    try:
        state_id = first.complete(TEXT, return_state=True)["state_id"]
        expected = first.complete(" Go on.", state_id=state_id)["token_ids"]
    finally:
        first.kill()
        first.close()
    with running(tiny, tmp_path / "two", *options) as other:
        assert other.complete(" Go on.", state_id=state_id)["token_ids"] == expected
