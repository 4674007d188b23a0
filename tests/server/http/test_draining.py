"""SIGTERM: new work is refused, what runs is finished, and a deadline ends even that cleanly."""

import json
import signal
import threading

import httpx
import pytest
import uvicorn

from server.http.draining import DrainingServer
from server.options import ServiceOptions
from server.service import Service
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import ANSWER, FakeEngine
from tests.waiting import PATIENCE_S

BODY = {"prompt": "x", "max_tokens": 1000, "stream": True}


class Reader(threading.Thread):
    """A client that reads a whole stream."""

    def __init__(self, server: Loopback) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/v1/completions"
        self.lines: list[str] = []

    def run(self) -> None:
        client = httpx.Client(trust_env=False, verify=False, timeout=PATIENCE_S)
        with client, client.stream("POST", self._url, json=BODY) as answer:
            for line in answer.iter_lines():
                if line:
                    self.lines.append(line)

    @property
    def text(self) -> str:
        chunks = [json.loads(line.removeprefix("data: ")) for line in self.lines[:-1]]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def wait_for_end(server: Loopback) -> None:
    server.thread.join(PATIENCE_S)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [True, False])
def test_a_second_signal_ends_answers_with_the_error_envelope(
    byte_tokenizer: Tokenizer, options: ServiceOptions, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine = FakeEngine(hold_after=1)
    answers: list[httpx.Response] = []
    with serve(engine, options, byte_tokenizer, drain_timeout_s=600) as server:
        body = {**BODY, "stream": stream}
        asking = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=body)))
        asking.start()
        server.wait_until(lambda: server.service.num_active == 1)
        server.signal()
        server.signal()
        asking.join(PATIENCE_S)
        wait_for_end(server)
    (answer,) = answers
    if stream:
        *_, error, done = [line for line in answer.text.splitlines() if line]
        assert (json.loads(error.removeprefix("data: "))["error"]["code"], done) == ("engine_stopped", "data: [DONE]")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")
    assert "Traceback" not in caplog.text


def test_an_idle_server_stops_at_once(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    with serve(FakeEngine(), options, byte_tokenizer, drain_timeout_s=60) as server:
        server.signal()
        wait_for_end(server)


def test_what_runs_is_finished_while_new_work_is_refused(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    gate = threading.Event()
    with serve(FakeEngine(hold_after=1, gate=gate), options, byte_tokenizer, drain_timeout_s=60) as server:
        reader = Reader(server)
        reader.start()
        server.wait_until(lambda: server.service.num_active == 1)
        server.signal()
        assert server.http.get("/ready").status_code == 503
        refused = server.http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert server.http.get("/health").json()["status"] == "draining"
        gate.set()
        reader.join(PATIENCE_S)
        wait_for_end(server)
    assert reader.text == ANSWER
    assert reader.lines[-1] == "data: [DONE]"


def test_in_the_drain_delay_work_is_taken_and_balancers_are_told(
    byte_tokenizer: Tokenizer, options: ServiceOptions
) -> None:
    with serve(FakeEngine(), options, byte_tokenizer, drain_timeout_s=60, drain_delay_s=3600) as server:
        before = server.http.get("/ready")
        assert (before.status_code, "connection" in before.headers) == (200, False)
        server.signal()
        ready = server.http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        answer = server.http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert server.http.get("/health").json()["status"] == "ok"
        server.signal()  # no more waiting
        wait_for_end(server)


def test_after_the_drain_delay_new_work_is_for_another_replica(
    byte_tokenizer: Tokenizer, options: ServiceOptions
) -> None:
    gate = threading.Event()
    engine = FakeEngine(hold_after=1, gate=gate)
    with serve(engine, options, byte_tokenizer, drain_timeout_s=3600, drain_delay_s=0.2) as server:
        reader = Reader(server)
        reader.start()
        server.wait_until(lambda: server.service.num_active == 1)
        server.signal()
        server.wait_until(lambda: server.service.draining)
        refused = server.http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["x-dijiang-retry"] == "another-replica"
        gate.set()
        reader.join(PATIENCE_S)
        wait_for_end(server)
    assert reader.text == ANSWER


def test_after_the_deadline_what_runs_ends_with_a_clean_error(
    byte_tokenizer: Tokenizer, options: ServiceOptions
) -> None:
    with serve(FakeEngine(hold_after=1), options, byte_tokenizer, drain_timeout_s=0.2) as server:
        reader = Reader(server)
        reader.start()
        server.wait_until(lambda: reader.lines)
        server.signal()
        reader.join(PATIENCE_S)
        wait_for_end(server)
    error, done = reader.lines[-2:]
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["code"], told["type"], told["param"]) == ("server_shutdown", "server_error", None)
    assert told["state_id"] is None  # this server keeps none
    assert told["choices"] == [{"index": 0, "state_id": None, "completion_tokens": 1}]
    assert "send the request again" in told["message"]
    assert done == "data: [DONE]"


def test_choices_that_wait_for_a_prompts_scores_are_ended_with_the_one_that_scores_it(
    byte_tokenizer: Tokenizer, options: ServiceOptions
) -> None:
    body = {"prompt": "x", "n": 3, "temperature": 1, "prompt_logprobs": 1}
    answers: list[httpx.Response] = []
    with serve(FakeEngine(hold_after=0), options, byte_tokenizer, drain_timeout_s=0.2) as server:
        sender = threading.Thread(
            target=lambda: answers.append(server.http.post("/v1/completions", json=body, timeout=PATIENCE_S)),
            daemon=True,
        )
        sender.start()
        server.wait_until(lambda: server.service.num_active == 1)
        server.signal()
        sender.join(PATIENCE_S)
        wait_for_end(server)
    (answer,) = answers
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_shutdown")
    assert [choice["index"] for choice in answer.json()["error"]["choices"]] == [0, 1, 2]


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_process_that_something_keeps_is_ended_all_the_same(
    byte_tokenizer: Tokenizer, options: ServiceOptions, monkeypatch: pytest.MonkeyPatch, num_signals: int
) -> None:
    limits = {"SAVE_S": 0.01, "MARGIN_S": 0.01, "FORCED_S": 3600.0} if num_signals == 1 else {"FORCED_S": 0.01}
    for name, value in limits.items():
        monkeypatch.setattr(f"server.http.draining.{name}", value)
    gave_up = threading.Event()
    server = DrainingServer(
        uvicorn.Config(app="nobody"),
        Service(FakeEngine(), options, byte_tokenizer),
        FakeEngine(),
        drain_timeout_s=0.01,
        give_up=gave_up.set,
    )
    for _ in range(num_signals):  # and nobody ever looks at what they ask for
        server.handle_exit(signal.SIGTERM, None)
    assert gave_up.wait(PATIENCE_S)
    assert (server.ends_at is not None) is (num_signals == 2)


def test_what_takes_too_long_to_save_does_not_hold_up_the_end(
    byte_tokenizer: Tokenizer, options: ServiceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.http.draining.SAVE_S", 0.05)
    engine = FakeEngine(hold_after=1)
    monkeypatch.setattr(engine, "suspend", lambda *_, **__: None)  # as if a disk did not answer
    with serve(engine, options, byte_tokenizer, drain_timeout_s=0.05) as server:
        reader = Reader(server)
        reader.start()
        server.wait_until(lambda: reader.lines)
        server.signal()
        reader.join(PATIENCE_S)
        wait_for_end(server)
    assert json.loads(reader.lines[-2].removeprefix("data: "))["error"]["code"] == "engine_stopped"


def test_an_engine_that_cannot_be_loaded_ends_the_server(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    engine = FakeEngine()
    with serve(engine, options, byte_tokenizer, drain_timeout_s=60) as server:
        engine.status = "failed"
        wait_for_end(server)
