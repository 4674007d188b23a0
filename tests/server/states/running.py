"""A real `dijiang serve` with a states folder, that can be killed whole and started again."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from tests.ports import free_port
from tests.waiting import PATIENCE_S, until

ANN, BOB = "key-of-ann", "key-of-bob"


@dataclass
class Running:
    """One server process and its clients; Ann asks unless another key is given."""

    base_url: str
    process: subprocess.Popen[bytes]
    log: Path
    http: httpx.Client = field(init=False)
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.base_url, timeout=PATIENCE_S, headers=bearer(ANN), trust_env=False)
        self.client = openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=ANN, max_retries=0, timeout=PATIENCE_S)

    @property
    def port(self) -> int:
        return int(self.base_url.rpartition(":")[2])

    def post(self, path: str, key: str = ANN, **body: Any) -> dict[str, Any]:
        """The answer to a request that must work."""
        response = self.http.post(path, json=body, headers=bearer(key))
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def get(self, path: str, key: str = ANN) -> dict[str, Any]:
        response = self.http.get(path, headers=bearer(key))
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def refused(self, method: str, path: str, key: str = ANN, **more: Any) -> tuple[int, str | None, str | None]:
        """Status, code and param of a request that must not work."""
        response = self.http.request(method, path, headers=bearer(key), **more)
        assert response.status_code >= 400, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return response.status_code, error["code"], error["param"]

    def complete(self, prompt: str | list[int] | None, key: str = ANN, **more: Any) -> dict[str, Any]:
        """One greedy completion: its choice, with the usage in it."""
        body = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True, **more}
        if prompt is not None:
            body["prompt"] = prompt
        answer = self.post("/v1/completions", key, **body)
        return {**answer["choices"][0], "usage": answer["usage"]}

    def chat(self, *messages: tuple[str, str], key: str = ANN, **more: Any) -> dict[str, Any]:
        """One greedy chat answer: its choice, with the usage in it."""
        body = {"temperature": 0, "max_tokens": 8, "return_token_ids": True, **more}
        body["messages"] = [{"role": role, "content": content} for role, content in messages]
        answer = self.post("/v1/chat/completions", key, **body)
        return {**answer["choices"][0], "usage": answer["usage"], "prompt_token_ids": answer["prompt_token_ids"]}

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def gauge(self, name: str) -> float:
        """A number from /metrics; 0 before the engine has worked."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next((line.split()[1] for line in lines if line.startswith(f"{name} ")), 0))

    def kill(self) -> None:
        """`kill -9` of the service and its engine, at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in (*parent.children(), parent):
                process.kill()
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.http.close()
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            finally:
                self.kill()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def cached(usage: dict[str, Any]) -> int:
    tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    return tokens


@contextlib.contextmanager
def running(model: Path, states: Path, *options: str) -> Iterator[Running]:
    """Starts the command on a free port, waits until it is ready, and ends it."""
    server = start(model, states, *options)
    try:
        yield server
    finally:
        server.close()


def start(model: Path, states: Path, *options: str, port: int | None = None) -> Running:
    """A started and ready server, on a free port if none is given; the caller closes or kills it."""
    port = free_port() if port is None else port
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", str(port), "--threads", "1"]
    command += ["--max-conversations", "16", "--states-folder", str(states), "--api-keys", f"{ANN},{BOB}"]
    command += ["--max-answer-tokens", "0", *options]  # on a busy machine, what runs for ever is longer than the limit
    log = states.parent / f"{states.name}.{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output)
    server = Running(f"http://127.0.0.1:{port}", process, log)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return server.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    until(is_ready, or_fail=log.read_text)
    return server
