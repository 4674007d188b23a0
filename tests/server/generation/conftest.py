"""A tiny model behind the service, and choices that are known."""

from collections.abc import Iterator
from typing import Any

import pytest

from dijiang_model.serving.network import FrozenModel
from server.text.tokenizer import Tokenizer
from tests.server.conftest import OPTIONS, Loopback, serve
from tests.server.tiny_engine import TinyEngine
from tests.tiny_models import tiny_network


@pytest.fixture(scope="module")
def tiny_model() -> FrozenModel:
    return tiny_network()


@pytest.fixture(scope="module")
def tiny_server(
    tiny_model: FrozenModel, byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loopback]:
    engine = TinyEngine(tiny_model, str(tmp_path_factory.mktemp("model")))
    with serve(engine, OPTIONS, byte_tokenizer) as running:  # type: ignore[arg-type]
        yield running


def completed(server: Loopback, **fields: Any) -> dict[str, Any]:
    """One choice of a completion, greedy unless `fields` say otherwise."""
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]  # type: ignore[no-any-return]
