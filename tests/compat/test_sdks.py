"""SDKs and frameworks, unmodified: what they give is what the server says, whole and streamed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.compat.conftest import ROOT, Tiny, require, run_client
from tests.docs.blocks import blocks
from tests.docs.tables import ADDRESS

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
PROGRAMS = ROOT / "tests/compat/programs"
EXAMPLES = ROOT / "clients/examples"


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> dict[str, Any]:
    """What plain HTTP says to the same question."""
    choice = tiny.server.client.chat.completions.create(
        model=tiny.server.model,
        messages=[{"role": "user", "content": "Hé?"}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
    ).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    return {
        "text": choice.message.content,
        "logprobs": pytest.approx([entry.logprob for entry in choice.logprobs.content], abs=1e-5),
        "num_tokens": len(choice.logprobs.content),
    }


def run_python(program: str, tiny: Tiny, home: Path) -> dict[str, Any]:
    command = [str(require("official", "bin/python")), str(PROGRAMS / program), tiny.server.model]
    return json.loads(run_client(command, home=home, BASE_URL=f"{tiny.server.base_url}/v1"))  # type: ignore[no-any-return]


def run_node(program: str, tiny: Tiny, home: Path, *, needs: str) -> dict[str, Any]:
    script = node_script(PROGRAMS / program, home, needs=needs)
    command = ["node", str(script), tiny.server.model]
    return json.loads(run_client(command, home=home, BASE_URL=f"{tiny.server.base_url}/v1"))  # type: ignore[no-any-return]


def node_script(program: Path, home: Path, *, needs: str) -> Path:
    """A copy of a program where Node finds its packages: next to it."""
    modules = require("npm", f"node_modules/{needs}").parents[needs.count("/")]
    script = home / program.name
    script.write_text(program.read_text())
    (home / "node_modules").symlink_to(modules)
    return script


def fits(place: dict[str, Any]) -> bool:
    """Whether an object follows the schema that all the programs ask for."""
    return place.keys() == {"city", "size"} and place["city"] in {"Paris", "Tokyo"} and 0 <= place["size"] <= 9


def test_the_official_python_client(tiny: Tiny, expected: dict[str, Any], tmp_path: Path) -> None:
    got = run_python("official.py", tiny, tmp_path)
    assert got["models"] == [tiny.server.model]
    assert got["whole"] == got["streamed"] == got["response"] == expected["text"]
    assert got["logprobs"] == expected["logprobs"]
    assert fits(got["parsed"])
    assert got["arguments"]
    assert all(fits(arguments) for arguments in got["arguments"])
    assert got["cached"] > 0


def test_langchain(tiny: Tiny, expected: dict[str, Any], tmp_path: Path) -> None:
    got = run_python("with_langchain.py", tiny, tmp_path)
    assert got["whole"] == got["streamed"] == expected["text"]
    assert got["usage"] == expected["num_tokens"]
    assert got["logprobs"] == expected["logprobs"]
    assert fits(got["parsed"])
    assert got["arguments"]
    assert all(fits(arguments) for arguments in got["arguments"])


def test_anthropic(tiny: Tiny, expected: dict[str, Any], tmp_path: Path) -> None:
    got = run_python("with_anthropic.py", tiny, tmp_path)
    assert got["text"] == got["streamed"] == expected["text"]
    assert got["stop_reasons"] == ["max_tokens", "max_tokens", "tool_use"]
    assert got["usage"] == [expected["num_tokens"]] * 2
    assert got["calls"] == [["look_up", ["key"]]] * 2
    assert len({*got["input_tokens"]}) == 1
    assert got["error"] == "not_found_error"


def test_instructor(tiny: Tiny, tmp_path: Path) -> None:
    got = run_python("with_instructor.py", tiny, tmp_path)
    assert len(got) == 2
    assert all(fits(place) for place in got.values())


def test_the_llm_command(tiny: Tiny, expected: dict[str, Any], tmp_path: Path) -> None:
    llm = require("official", "bin/llm")
    models = [{"model_id": "tiny", "model_name": tiny.server.model, "api_base": f"{tiny.server.base_url}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    command = [str(llm), "-m", "tiny", "-o", "max_tokens", "8", "-o", "temperature", "0", "--no-log", "Hé?"]
    for more in ([], ["--no-stream"]):
        said = run_client([*command, *more], home=tmp_path, LLM_USER_PATH=str(tmp_path))
        assert said.removesuffix("\n") == expected["text"]


def test_the_official_javascript_client(tiny: Tiny, expected: dict[str, Any], tmp_path: Path) -> None:
    got = run_node("official.mjs", tiny, tmp_path, needs="openai")
    assert got["models"] == [tiny.server.model]
    assert got["whole"] == got["streamed"] == expected["text"]
    assert got["logprobs"] == expected["logprobs"]
    assert got["usage"] == expected["num_tokens"]
    assert got["echoed"] == "Hé?"
    assert got["refused"] == {"kind": "BadRequestError", "param": "temperature"}


def test_the_javascript_of_the_pages(tiny: Tiny, tmp_path: Path) -> None:
    found = [block for block in blocks() if block.language == "js"]
    assert found
    for number, block in enumerate(found):
        program = tmp_path / "pages" / f"{number}.mjs"
        program.parent.mkdir(exist_ok=True)
        text = re.sub(ADDRESS, tiny.server.base_url.removeprefix("http://"), block.text)
        program.write_text(text.replace("smollm2-135m-dijiang", tiny.server.model))
        (tmp_path / str(number)).mkdir()
        script = node_script(program, tmp_path / str(number), needs="openai")
        assert run_client(["node", str(script)], home=tmp_path), f"{block} says nothing"


@pytest.mark.parametrize("language", ["js", "py"])
def test_the_examples_of_streamed_tools(tiny: Tiny, tmp_path: Path, language: str) -> None:
    environment = {"BASE_URL": f"{tiny.server.base_url}/v1", "MAX_TOKENS": "8"}
    if language == "js":
        command = ["node", str(node_script(EXAMPLES / "stream_tools.mjs", tmp_path, needs="openai"))]
    else:
        command = [str(require("official", "bin/python")), str(EXAMPLES / "stream_tools.py")]
    said = run_client([*command, "Weather?"], home=tmp_path, **environment)
    found = re.search(r"\[get_weather (\{.*?\})\n-> (.*?)\n", said, re.DOTALL)
    assert found is not None, said
    arguments = json.loads(found[1])
    assert found[2] == f"{arguments['city']}: sunny for {arguments['days']} days"
    if language == "py":
        total, cached = map(int, re.findall(r"(\d+) tokens, (\d+) of them", said)[0])
        assert total - 200 < cached < total  # the tool's result and the frame around it, in bytes
