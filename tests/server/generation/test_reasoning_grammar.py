"""Thoughts before structured output, with a real grammar in a real engine: a random model, steered by the masks."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Server, serving
from tests.server.thinking_models import CLOSE_ID, OPEN_ID, OPENING_TEMPLATE, marked_json
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": [1, 2]}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {**SCHEMA}, "strict": True}}


@pytest.fixture(scope="module", params=[False, True], ids=["free", "opened"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose marks are special tokens; its template opens thoughts, or leaves that to the model."""
    folder = write_tiny_model(tmp_path_factory.mktemp("thinking") / "tiny")
    text = marked_json(folder)
    (folder / "tokenizer.json").write_text(text)
    if request.param:
        (folder / "chat_template.jinja").write_text(OPENING_TEMPLATE)
    with serving(folder) as running:
        yield running


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Hé?"}], "max_tokens": 400, **fields}
    # The random model would think for ever: its marks are made likely.
    body["logit_bias"] = {str(OPEN_ID): 100, str(CLOSE_ID): 3.0}
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_json_comes_behind_a_free_thought(server: Server, seed: int) -> None:
    answer = ask(server, response_format=FORMAT, seed=seed)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]).keys() == {"size", "ok"}
    details, thought = answer["usage"]["completion_tokens_details"], choice["message"].get("reasoning_content", "")
    assert details["reasoning_tokens"] >= 1
    assert details["reasoning_tokens"] >= len(thought.encode("utf-8", "ignore")) // 3
    assert "<think>" not in json.dumps(choice)


def test_a_forced_call_comes_behind_a_thought(server: Server) -> None:
    [choice] = ask(server, tools=[ADD], tool_choice="required", seed=5)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert all(
        json.loads(call["function"]["arguments"]).keys() == {"size", "ok"} for call in choice["message"]["tool_calls"]
    )


def test_thoughts_are_not_to_be_found_without_a_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", with_tokenizer=False)
    command = [sys.executable, "-m", "server", "serve", str(folder), "--port", "0", "--no-states"]
    done = subprocess.run([*command, "--reasoning-parser", "think"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "reasoning_parser think has no effect: the model has no tokenizer" in " ".join(done.stderr.split())
