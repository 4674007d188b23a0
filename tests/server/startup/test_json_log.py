"""With `--log-format json` whatever a server writes is a line of JSON each."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import serving
from tests.server.startup.test_cli import dijiang
from tests.tiny_models import write_tiny_model
from tests.waiting import until


def lines_of(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    return lines


def test_a_server_writes_nothing_but_json_from_its_start_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIJIANG_API_KEY", "misplaced")
    folder, log = write_tiny_model(tmp_path / "tiny"), tmp_path / "log"
    with log.open("wb") as output, serving(folder, "--log-format", "json", output=output) as server:
        assert server.greedy("x", max_tokens=2)
        assert server.get("/v1/nothing").status_code == 404
        engine = server.engine
        engine.kill()
        until(lambda: server.gauge("dijiang_engine_restarts_total") == 1)
        until(lambda: server.get("/ready").status_code == 200)
    told = {line["event"]: line for line in lines_of(log.read_text())}
    assert told["DiJiang is ready"]["base_url"] == f"{server.base_url}/v1"
    assert told["DiJiang is ready"]["saved_states"] == "not saved"
    assert any("DIJIANG_API_KEY is for clients" in event for event in told)
    assert "request" in told


@pytest.mark.parametrize("arguments", [["nowhere"], ["--port", "x"], ["--max-n", "200"]])
@pytest.mark.parametrize("is_flag", [True, False])
def test_what_is_wrong_at_the_start_is_json_too(arguments: list[str], is_flag: bool) -> None:
    flags = ["--log-format", "json"] if is_flag else []
    answer = dijiang("serve", *arguments, *flags, environment={} if is_flag else {"DIJIANG_LOG_FORMAT": "json"})
    assert (answer.returncode, answer.stdout) == (1, "")
    assert {line["level"] for line in lines_of(answer.stderr)} == {"error"}
