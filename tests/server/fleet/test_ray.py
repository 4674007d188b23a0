"""Two engines of a fleet under load with the official client: one is killed, all are replaced, one comes and goes."""

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.server.fleet.running import Fleet, running_fleet
from tests.server.states.conftest import postgres
from tests.server.states.postgres_server import PostgresServer
from tests.server.states.running import ANN, BOB
from tests.tiny_models import write_tiny_model
from tests.waiting import PATIENCE_S, until

__all__ = ["postgres"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
BUSY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def fleet(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    serve = {
        "model": str(write_tiny_model(folder / "model")),
        "threads": 1,
        "max_conversations": 4,
        "drain_timeout_s": 60,
        "states_folder": str(folder / "copies"),
        "state_store": postgres.url,
        "state_store_schema": f"test_{secrets.token_hex(8)}",
        "api_keys": f"{ANN},{BOB}",
    }
    with running_fleet(folder, serve, min_replicas=2) as running:
        yield running


class Load:
    """Clients that ask on and on and never a second time; what they got, and what went wrong."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.answers: Counter[str] = Counter()
        self.problems: list[str] = []
        self.cut: list[openai.APIError] = []
        self._stop = threading.Event()

    @contextmanager
    def running(self, *work: Callable[[openai.OpenAI], None]) -> Iterator[None]:
        threads = [threading.Thread(target=self._repeat, args=(one,), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)

    def _repeat(self, work: Callable[[openai.OpenAI], None]) -> None:
        with self._fleet.client() as client:
            while not self._stop.is_set():
                try:
                    work(client)
                except openai.APIError as error:
                    if getattr(error, "code", None) in ("replica_lost", "server_shutdown"):
                        self.cut.append(error)
                    self.problems.append(f"{work.__name__}: {error!r}")

    def whole(self, client: openai.OpenAI) -> None:
        answer = client.completions.with_raw_response.create(model="model", prompt="Hi", max_tokens=6, **BUSY)
        self.answers[answer.headers["x-dijiang-replica"]] += 1

    def chat(self, client: openai.OpenAI) -> None:
        messages: Any = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.with_raw_response.create(model="model", messages=messages, max_tokens=6)
        self.answers[answer.headers["x-dijiang-replica"]] += 1

    def streamed(self, client: openai.OpenAI) -> None:
        stream = client.completions.create(model="model", prompt="On", max_tokens=300, stream=True, **BUSY)
        assert sum(len(chunk.choices) for chunk in stream) > 1

    def long(self, client: openai.OpenAI) -> None:
        client.completions.create(model="model", prompt="On", max_tokens=6000, **BUSY)

    def more_answers(self) -> Callable[[], bool]:
        before = self.answers.total()
        return lambda: self.answers.total() >= before + 10


def both_are_there(fleet: Fleet) -> None:
    until(lambda: len(fleet.engines) == 2 and len(fleet.names) == 2)


def test_a_killed_engine_costs_no_saved_conversation_and_cut_streams_say_how(fleet: Fleet) -> None:
    fleet.deploy(min_replicas=2)
    both_are_there(fleet)
    talks = [fleet.complete(prompt=f"Talk {number}", return_state=True)["state_id"] for number in range(6)]
    expected = {state: fleet.complete(prompt=" more", state_id=state)["token_ids"] for state in talks}
    load = Load(fleet)
    begun = threading.Barrier(5)

    def one_long_answer(state: str) -> None:
        with fleet.client() as client:
            stream = client.completions.create(
                model="model",
                prompt=" on",
                max_tokens=60_000,
                stream=True,
                temperature=0,
                extra_body={"ignore_eos": True, "state_id": state},
            )
            next(iter(stream))
            begun.wait(PATIENCE_S)
            try:
                for _ in stream:
                    pass
            except openai.APIError as error:
                load.cut.append(error)

    threads = [threading.Thread(target=one_long_answer, args=(state,), daemon=True) for state in talks[:4]]
    for thread in threads:
        thread.start()
    begun.wait(PATIENCE_S)
    with load.running(load.whole, load.chat):
        until(load.more_answers())
        victim = fleet.engines[0]
        victim.kill()
        until(load.more_answers())  # requests succeed at the other one at once
        for state, tokens in expected.items():
            assert fleet.complete(prompt=" more", state_id=state)["token_ids"] == tokens
    assert load.problems == [], "a request that had not been answered was answered by the other engine"
    until(lambda: load.cut)
    for error in load.cut:
        assert error.code == "replica_lost"
        assert isinstance(error.body, dict)
        assert error.body["state_id"] in talks, "the state to send the request again with"
    both_are_there(fleet)  # Ray has replaced it


def test_a_rolling_update_under_load_fails_no_request(fleet: Fleet) -> None:
    fleet.deploy(min_replicas=2)
    both_are_there(fleet)
    old = fleet.names
    load = Load(fleet)
    with load.running(load.whole, load.chat, load.streamed):
        until(load.more_answers())
        fleet.deploy(min_replicas=2, serve={"retry_after_s": 3})
        until(lambda: load.problems or (len(fleet.names) == 2 and not fleet.names & old))
        until(load.more_answers())
    assert load.problems == []
    assert {*load.answers} - old, "the new ones have answered"


def test_engines_come_and_go_with_the_load(fleet: Fleet) -> None:
    fleet.deploy(min_replicas=1, upscale_delay_s=1.0, downscale_delay_s=3.0)
    until(lambda: len(fleet.names) == 1)
    load = Load(fleet)
    with load.running(*[load.long] * 8):
        until(lambda: len(fleet.names) == 2)
    until(lambda: len(fleet.names) == 1)
    assert load.problems == []
