"""The default model as `make serve` serves it, through the official client. Slow: a real model on the CPU."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.answers import ask
from dijiang_model.conversion.default_model import ensure_default_model
from tests.e2e.serving import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Path(ensure_default_model())) as running:
        yield running


def test_it_names_the_capital_of_france_streamed_and_whole(server: Server) -> None:
    options = {"model": "smollm2-135m-dijiang", "messages": [QUESTION], "temperature": 0}
    whole = server.client.chat.completions.create(**options)
    chunks = list(server.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason == "stop"


def test_48_of_50_answers_without_any_sampling_field_name_paris_and_end_by_themselves(server: Server) -> None:
    found = asyncio.run(ask(server.base_url, str(QUESTION["content"]), "Paris", num_seeds=50, max_tokens=60))
    assert found.num_good >= 48, found.bad
