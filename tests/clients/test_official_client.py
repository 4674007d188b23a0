"""The official client and ours, side by side against the same answers."""

import openai
import pytest

from clients import errors
from clients.client import Client
from tests.clients import answers
from tests.clients.loopback import Exchange, loopback_server

STATUSES = [400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 500, 502, 503, 504, 529]


@pytest.mark.parametrize("should_retry", [None, "true", "false"])
def test_both_send_failing_requests_equally_often(should_retry: str | None) -> None:
    headers = {"retry-after-ms": "1", "content-type": "application/json"}
    if should_retry is not None:
        headers["x-should-retry"] = should_retry

    def handle(exchange: Exchange) -> None:
        exchange.answer(int(exchange.path.rpartition("/")[2]), answers.error("no"), headers)

    with loopback_server(handle) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as official:
            for status in STATUSES:
                with pytest.raises(openai.APIStatusError):
                    official.models.retrieve(str(status))
        expected = [exchange.path for exchange in server.requests]
        with Client(server.url) as client:
            for status in STATUSES:
                with pytest.raises(errors.APIStatusError):
                    client.model(str(status))
    assert [exchange.path for exchange in server.requests] == expected * 2


def test_both_read_the_same_stream_alike() -> None:
    chunks = answers.chat_chunks("Hel", "", "lo 你好")
    with loopback_server(lambda exchange: exchange.stream(*chunks)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as official:
            stream = official.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            expected = [chunk.model_dump(exclude_unset=True) for chunk in stream]
        with (
            Client(server.url, model="tiny") as client,
            client.stream_chat([{"role": "user", "content": "Hi"}]) as ours,
        ):
            got = [chunk.model_dump(mode="json", exclude_unset=True) for chunk in ours]
    assert got == expected
    assert server.requests[0].body == server.requests[1].body
