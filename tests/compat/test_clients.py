"""Other people's clients, unmodified: what each gets is what the server says, whole or streamed."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.compat.conftest import ROOT, Tiny, require, run_client
from tests.compat.test_sdks import PROGRAMS, expected, fits

__all__ = ["expected"]  # a fixture
pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
NODE = "npm"


@dataclass(frozen=True)
class Client:
    """One program.

    Attributes:
        environment: its folder in .venv-clients.
        program: in tests/compat/programs.
        has_calls: whether the client can force calls of tools.
        has_usage: whether it says how many tokens an answer had.
        is_greedy: whether it hands on a temperature, so that its answers are known.
    """

    environment: str
    program: str
    has_calls: bool = True
    has_usage: bool = True
    is_greedy: bool = True


CLIENTS = [
    Client("litellm", "with_litellm.py"),
    Client("litellm", "with_litellm_proxy.py"),
    Client("pydantic-ai", "with_pydantic_ai.py"),
    Client("llama-index", "with_llama_index.py"),
    Client("dspy", "with_dspy.py"),
    Client("openai-agents", "with_openai_agents.py"),
    Client("smolagents", "with_smolagents.py"),
    Client("haystack", "with_haystack.py"),
    Client("autogen", "with_autogen.py"),
    Client("semantic-kernel", "with_semantic_kernel.py"),
    Client("mirascope", "with_mirascope.py", is_greedy=False),
    Client("outlines", "with_outlines.py", has_calls=False, has_usage=False),
    Client("official", "with_ollama.py", has_calls=False),
    Client(NODE, "vercel_compatible.mjs"),
    Client(NODE, "vercel_anthropic.mjs"),
    Client(NODE, "anthropic.mjs"),
    Client(NODE, "langchain.mjs"),
    Client(NODE, "openai_agents.mjs"),
]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.program)
def test_a_client_gets_what_the_server_says(
    client: Client, tiny: Tiny, expected: dict[str, Any], tmp_path: Path
) -> None:
    got = json.loads(_run(client, tiny, tmp_path).splitlines()[-1])
    if client.is_greedy:
        assert got["text"] == got["streamed"] == expected["text"]
    assert got["text"]
    assert got["streamed"]
    assert bool(got["calls"]) == client.has_calls
    assert all(fits(arguments) for arguments in got["calls"])
    assert got["structured"]
    assert all(fits(place) for place in got["structured"])
    if client.is_greedy:
        assert set(got["usage"]) == ({expected["num_tokens"]} if client.has_usage else set())
    assert "the model 'nobody' does not exist here" in got["error"]


def _run(client: Client, tiny: Tiny, home: Path) -> str:
    if client.environment == NODE:
        (home / "node_modules").symlink_to(require(NODE, "node_modules"))
        for name in ("common.mjs", client.program):
            shutil.copy(PROGRAMS / name, home / name)
        command = ["node", str(home / client.program)]
    else:
        command = [str(require(client.environment, "bin/python")), str(PROGRAMS / client.program)]
    return run_client([*command, tiny.server.model], home=home, BASE_URL=f"{tiny.server.base_url}/v1")


def test_the_http_client_of_java(tiny: Tiny, expected: dict[str, Any], tmp_path: Path) -> None:
    java = shutil.which("java")
    if java is None:
        pytest.skip("NOT RUN: there is no java; on Debian it comes with: apt-get install default-jdk-headless")
    command = [java, "-Dfile.encoding=UTF-8", str(PROGRAMS / "Http.java"), tiny.server.model]
    lines = run_client(command, home=tmp_path, BASE_URL=f"{tiny.server.base_url}/v1").splitlines()
    assert [line.split()[0] for line in lines] == ["200", "200", "200", "200", "404"]
    whole, chunks, called, formed, refused = (json.loads(line.partition(" ")[2]) for line in lines)
    assert whole["choices"][0]["message"]["content"] == expected["text"]
    assert whole["usage"]["completion_tokens"] == expected["num_tokens"]
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(texts) == expected["text"]
    assert chunks[-1]["usage"] == whole["usage"]
    calls = called["choices"][0]["message"]["tool_calls"]
    assert all(fits(json.loads(call["function"]["arguments"])) for call in calls)
    assert fits(json.loads(formed["choices"][0]["message"]["content"]))
    assert "the model 'nobody' does not exist here" in refused["error"]["message"]


def test_aider_asks_by_its_message_mode(tiny: Tiny, tmp_path: Path) -> None:
    aider = require("aider", "bin/aider")
    # The end of the text after 8 tokens: aider takes an answer that was cut off for an error.
    ending = {"temperature": 0, "extra_body": {"min_tokens": 8, "logit_bias": {"258": 100}}}
    settings = [{"name": f"openai/{tiny.server.model}", "extra_params": ending}]
    (tmp_path / "settings.yml").write_text(json.dumps(settings))  # JSON is YAML
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings"]
    quiet += ["--map-tokens", "0", "--no-pretty", "--model-settings-file", str(tmp_path / "settings.yml")]
    address = ["--openai-api-base", f"{tiny.server.base_url}/v1", "--openai-api-key", "any"]
    for more in (["--stream"], ["--no-stream"]):
        model = ["--model", f"openai/{tiny.server.model}", "--chat-mode", "ask", "--message", "Hello"]
        said = run_client([str(aider), *model, *address, *quiet, *more], home=tmp_path, TERM="dumb")
        assert "Tokens: " in said, said
        assert "received" in said, said
    said = run_client([str(aider), "--model", "openai/nobody", "--message", "Hello", *address, *quiet], home=tmp_path)
    assert "the model 'nobody' does not exist here" in said


def test_guidellm_measures_the_server(tiny: Tiny, tmp_path: Path) -> None:
    guidellm = require("guidellm", "bin/guidellm")
    command = [str(guidellm), "run", "--disable-progress", "--profile", "kind=synchronous"]
    command += ["--backend", f"kind=openai_http,target={tiny.server.base_url},model={tiny.server.model}"]
    command += [
        "--constraint",
        "kind=max_requests,count=3",
        "--tokenizer",
        f"kind=huggingface_auto,model={tiny.folder}",
    ]
    command += ["--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"]
    report = tmp_path / "report.json"
    run_client([*command, "--output", f"kind=json,path={report}"], home=tmp_path)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 3
    assert not benchmark["requests"]["errored"]
    assert {request["output_tokens"] for request in benchmark["requests"]["successful"]} == {8}


def test_every_environment_has_a_test() -> None:
    names = {path.stem for path in (ROOT / "tests/compat/requirements").glob("*.txt")}
    tried = {client.environment for client in CLIENTS} | {"aider", "guidellm", "lm-eval", "llm-comply"}
    assert names <= tried
