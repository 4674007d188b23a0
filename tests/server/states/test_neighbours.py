"""Real processes: what one key does, or a hung engine, does not stop another key's next answer."""

import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil

from tests.server.states.running import ANN, BOB, Running, bearer, running
from tests.waiting import PATIENCE_S, until

SLOTS = 4


def engine_of(server: Running) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    return next(child for child in children if any("engine.process" in word for word in child.cmdline()))


def test_a_hung_engine_is_told_killed_and_started_again_and_states_stay(tiny: Path, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "states", "--heartbeat-s", "2") as server:
        state = server.complete("Once upon a time", return_state={})["state_id"]
        before = server.complete(None, state_id=state, max_tokens=12)["token_ids"]
        hung = engine_of(server)
        hung.send_signal(signal.SIGSTOP)
        asking = threading.Thread(target=lambda: server.http.post("/v1/completions", json={"prompt": "x"}))
        asking.start()
        until(lambda: server.http.get("/ready").status_code == 503)
        assert server.gauge("dijiang_engine_up") == 0
        asking.join(PATIENCE_S)
        assert not asking.is_alive(), "a request that hung with the engine ends with it"
        until(lambda: server.http.get("/ready").status_code == 200)
        assert server.gauge("dijiang_engine_up") == 1
        assert server.gauge("dijiang_engine_restarts_total") == 1
        assert not hung.is_running()
        assert server.complete(None, state_id=state, max_tokens=12)["token_ids"] == before


def test_a_key_that_holds_every_slot_and_reads_a_long_prompt_keeps_nobody_else_from_an_answer(
    tiny: Path, tmp_path: Path
) -> None:
    with running(tiny, tmp_path / "states", "--max-conversations", str(SLOTS)) as server, ExitStack() as stack:
        alone = server.complete("What is the capital of France?", key=BOB)["token_ids"]
        http = stack.enter_context(httpx.Client(base_url=server.base_url, timeout=PATIENCE_S, trust_env=False))

        def stream(**body: object) -> httpx.Response:
            body = {"stream": True, "ignore_eos": True, "max_tokens": 60_000, **body}
            context = http.stream("POST", "/v1/completions", json=body, headers=bearer(ANN))
            return stack.enter_context(context)

        endless = [stream(prompt=f"Tell me story {number}") for number in range(SLOTS)]
        lines = [response.iter_lines() for response in endless]
        for answer in lines:
            next(answer)  # it runs
        stream(prompt=[1 + number % 90 for number in range(300_000)])
        until(lambda: server.gauge("dijiang_num_requests_waiting") >= 1)
        assert server.complete("What is the capital of France?", key=BOB)["token_ids"] == alone
        assert server.gauge("dijiang_num_requests_running") + server.gauge("dijiang_num_requests_waiting") == SLOTS + 1
        for answer in lines:
            assert next(line for line in answer if line), "the others go on"
