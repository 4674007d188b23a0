"""One real server with a tiny model: company, leaving clients, a dying engine, long answers."""

import asyncio
import contextlib
import random
import signal
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from safetensors.torch import load_file

from tests.e2e.serving import Server, serving
from tests.tiny_models import write_tiny_model
from tests.waiting import until

GOLDEN = Path(__file__).parent.parent / "golden"
NUM_SLOTS = 48


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    options = ("--max-conversations", str(NUM_SLOTS), "--max-step-tokens", "128", "--unread-timeout-s", "3600")
    with serving(folder, *options) as running:
        yield running


def test_the_version_is_that_of_the_project(server: Server) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert server.get("/version").json() == {"version": project["version"]}


def test_64_requests_together_answer_as_each_alone(server: Server) -> None:
    rng = random.Random(0)
    requests = [("".join(rng.choices("abcdef ghij", k=rng.randint(1, 200))), rng.randint(1, 50)) for _ in range(64)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model=server.model, prompt=prompt, max_tokens=max_tokens, temperature=0)
                    for prompt, max_tokens in requests
                )
            )
        return [answer.choices[0].text for answer in answers]

    alone = [server.greedy(prompt, max_tokens=max_tokens) for prompt, max_tokens in requests]
    assert asyncio.run(together()) == alone


def test_a_stream_carries_the_text_and_usage_of_the_whole_answer(server: Server) -> None:
    options = {"model": server.model, "messages": [{"role": "user", "content": "Hé?"}], "temperature": 0}
    whole = server.client.chat.completions.create(**options, max_tokens=80)
    chunks = list(
        server.client.chat.completions.create(
            **options, max_tokens=80, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("prompt_length", [5_000, 5], ids=["in prefill", "in decode"])
def test_200_clients_that_leave_at_once_free_every_slot(server: Server, prompt_length: int) -> None:
    before = server.greedy("after the storm", max_tokens=20)
    host, port = server.base_url.removeprefix("http://").split(":")
    body = (
        f'{{"model": "{server.model}", "prompt": "{"x" * prompt_length}", "max_tokens": 100000000, '
        '"ignore_eos": true, "stream": true}'
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    with contextlib.ExitStack() as clients:
        for _ in range(200):
            client = clients.enter_context(socket.create_connection((host, int(port))))
            client.sendall(f"{head}\r\n\r\n{body}".encode())
        until(lambda: _num_requests(server) == 200)
    until(lambda: server.gauge("dijiang_slots_free") == NUM_SLOTS and _num_requests(server) == 0)
    assert server.greedy("after the storm", max_tokens=20) == before


def _num_requests(server: Server) -> float:
    return server.gauge("dijiang_num_requests_running") + server.gauge("dijiang_num_requests_waiting")


def test_killing_the_engine_ends_answers_cleanly_and_it_comes_back(server: Server) -> None:
    before = server.greedy("once more", max_tokens=20)
    restarts = server.gauge("dijiang_engine_restarts_total")
    stream = server.client.completions.create(
        model=server.model,
        prompt="go on",
        max_tokens=1_000_000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in range(5):
        next(stream)
    server.engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="restart"):
        list(stream)
    until(lambda: server.get("/ready").status_code == 200)
    assert server.get("/health").json()["engine_restarts"] == restarts + 1
    assert server.greedy("once more", max_tokens=20) == before
    assert server.gauge("dijiang_slots_free") == NUM_SLOTS


def test_a_long_answer_takes_no_more_memory_than_a_short_one(server: Server) -> None:
    """4,000 tokens, 31 times the teacher's range; 2 MiB allow for the allocator, a cache would take 8 MiB and more."""
    stream = server.client.completions.create(
        model=server.model,
        prompt="long",
        max_tokens=4_000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    num_tokens, memory = 0, {}
    for chunk in stream:
        num_tokens += len(chunk.choices[0].model_extra.get("token_ids", ())) if chunk.choices else 0
        for mark in (500, 3_900):
            if num_tokens >= mark:
                memory.setdefault(mark, server.engine.memory_info().rss)
    assert num_tokens == 4_000
    assert memory[3_900] - memory[500] < 2 << 20


@pytest.mark.parametrize("name", ["aligned", "straddling", "sign_flips"])
def test_a_released_checkpoint_is_served_by_token_ids(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")["greedy_ids"].flatten().tolist()
    with serving(GOLDEN / name) as server:
        answer = server.client.completions.create(
            model=name, prompt=expected[:8], max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].model_extra is not None
        assert answer.choices[0].model_extra["token_ids"] == expected[8:]
        with pytest.raises(openai.BadRequestError, match="tokenizer"):
            server.greedy("text", max_tokens=1)
