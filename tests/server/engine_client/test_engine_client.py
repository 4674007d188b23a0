"""The client of a live engine process: every stream ends once, whatever happens to whom."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from server.engine.types.requests import EngineConfig, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.engine_client.client import MAX_LOAD_FAILURES, EngineClient, EngineStatus
from server.engine_client.link import EngineLink
from server.errors import EngineUnavailableError, InvalidRequestError, OverloadedError
from server.http.errors import on_wire
from tests.server.engine.fakes import expected_output, request
from tests.server.engine_client.fake_process import BREAKING_TOKEN, EXIT_STATUS, MODULE
from tests.tiny_models import write_tiny_model
from tests.waiting import until_async

pytestmark = pytest.mark.anyio

NUM_SLOTS = 2
MAX_WAITING = 1
FAKE_CONFIG = EngineConfig(
    model_path="ok",
    device="cpu",
    weights_dtype="float32",
    num_threads=1,
    state_memory_bytes=2**20,
    max_num_slots=NUM_SLOTS,
    max_step_tokens=8,
    max_waiting=MAX_WAITING,
)


@asynccontextmanager
async def fake_client(**changes: object) -> AsyncIterator[EngineClient]:
    client = EngineClient(replace(FAKE_CONFIG, **changes), module=MODULE)  # type: ignore[arg-type]
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[EngineClient]:
    """A ready client of a fake engine that nobody harms."""
    async with fake_client() as client:
        await client.wait_ready()
        yield client


async def collect(client: EngineClient, wanted: GenerationRequest) -> list[TokenEvent]:
    async with client.submit(wanted) as stream:
        return [event async for event in stream]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def num_free(client: EngineClient) -> int | None:
    return None if client.stats is None else client.stats.num_free_slots


async def test_an_answer_is_the_engines_and_ends_once(shared: EngineClient) -> None:
    events = await collect(shared, request("a", 4, 5, max_tokens=6))
    assert tokens_of(events) == expected_output((4, 5), 6)
    assert [event.finish_reason for event in events] == [None] * 5 + [FinishReason.LENGTH]
    assert {event.request_id for event in events} == {"a"}


async def test_a_ready_client_knows_its_engine(shared: EngineClient) -> None:
    info = await shared.wait_ready()
    assert shared.info == info
    assert (shared.status, shared.failure, shared.num_restarts) == (EngineStatus.READY, None, 0)
    assert shared.pid is not None
    assert psutil.pid_exists(shared.pid)


async def test_concurrent_requests_each_get_their_own_tokens(shared: EngineClient) -> None:
    requests = [request(f"r{number}", number, number, max_tokens=20) for number in range(3)]
    answers = await asyncio.gather(*(collect(shared, wanted) for wanted in requests))
    for wanted, events in zip(requests, answers, strict=True):
        assert tokens_of(events) == expected_output(wanted.prompt_token_ids, 20)


async def test_a_full_engine_refuses_on_entering(shared: EngineClient) -> None:
    async with shared.submit(request("1")), shared.submit(request("2")), shared.submit(request("3")):
        with pytest.raises(OverloadedError) as refusal:
            await collect(shared, request("4", max_tokens=1))
        assert on_wire(refusal.value).status == 503
        assert on_wire(refusal.value).headers["Retry-After"] == "1"
    assert len(await collect(shared, request("4", max_tokens=1))) == 1


async def test_a_request_id_in_use_is_refused_and_free_after(shared: EngineClient) -> None:
    async with shared.submit(request("same")) as stream:
        with pytest.raises(InvalidRequestError) as refusal:
            await collect(shared, request("same", max_tokens=1))
        assert refusal.value.param == "request_id"
        assert (await anext(stream)).finish_reason is None, "the first one runs on"
    assert len(await collect(shared, request("same", max_tokens=1))) == 1


async def test_an_earlier_request_of_the_same_id_is_never_heard_again(shared: EngineClient) -> None:
    for _ in range(20):
        async with shared.submit(request("same", 9)) as stream:
            await anext(stream)
        assert tokens_of(await collect(shared, request("same", 7, max_tokens=2))) == expected_output((7,), 2)


@pytest.mark.parametrize("phase", ["before the engine saw it", "waiting", "prefill", "decode", "ended"])
async def test_leaving_frees_the_slot_in_every_phase(shared: EngineClient, phase: str) -> None:
    prompt = tuple(range(40)) * 200 if phase == "prefill" else (1, 2, 3)
    leaver = request("leaver", *prompt, max_tokens=1 if phase == "ended" else None)
    async with shared.submit(request("long 1")) as first, shared.submit(request("long 2")) as second:
        await anext(first)
        await anext(second)
        if phase == "waiting":
            async with shared.submit(leaver):
                await until_async(lambda: shared.stats is not None and shared.stats.num_waiting == 1)
    if phase != "waiting":
        async with shared.submit(leaver) as stream:
            if phase == "prefill":
                await until_async(lambda: shared.stats is not None and shared.stats.num_running == 1)
            elif phase != "before the engine saw it":
                await anext(stream)
    await until_async(lambda: num_free(shared) == NUM_SLOTS and shared.num_requests == 0)
    assert tokens_of(await collect(shared, request("next", 8, max_tokens=3))) == expected_output((8,), 3)


async def test_a_stream_that_was_left_ends_with_abort_for_whoever_still_reads(shared: EngineClient) -> None:
    async with shared.submit(request("a")) as stream:
        await anext(stream)
    events = [event async for event in stream]
    assert events[-1].finish_reason is FinishReason.ABORT
    assert [event.finish_reason for event in events].count(FinishReason.ABORT) == 1


async def test_an_exception_inside_the_context_aborts_too(shared: EngineClient) -> None:
    with pytest.raises(ZeroDivisionError):
        async with shared.submit(request("a")):
            raise ZeroDivisionError
    await until_async(lambda: num_free(shared) == NUM_SLOTS)


async def test_200_cancelled_at_once_leave_every_slot_free_and_the_next_answer_right() -> None:
    async with fake_client(max_waiting=300) as client:
        await client.wait_ready()
        tasks = [asyncio.create_task(collect(client, request(f"r{number}"))) for number in range(200)]
        await until_async(lambda: client.num_requests == 200 and client.stats is not None)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until_async(lambda: num_free(client) == NUM_SLOTS)
        assert client.num_requests == 0
        assert tokens_of(await collect(client, request("next", 8, max_tokens=3))) == expected_output((8,), 3)


async def test_closing_ends_what_runs_with_abort_and_may_be_done_twice() -> None:
    async with fake_client() as client:
        await client.wait_ready()
        pid = client.pid
        async with client.submit(request("a")) as stream:
            await anext(stream)
            await client.close()
            events = [event async for event in stream]
        assert events[-1].finish_reason is FinishReason.ABORT
        assert client.status is EngineStatus.STOPPED
        assert pid is not None
        assert not psutil.pid_exists(pid)
        with pytest.raises(EngineUnavailableError):
            await client.wait_ready()


async def test_closing_in_a_reload_ends_the_process_that_was_to_take_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    is_closing, close = asyncio.Event(), EngineLink.close

    async def close_slowly(link: EngineLink) -> None:
        is_closing.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await close(link)

    async def at_once() -> None:
        monkeypatch.setattr(EngineLink, "close", close_slowly)

    children = psutil.Process().children
    before = {child.pid for child in children()}
    async with fake_client() as client:
        await client.wait_ready()
        reload = asyncio.create_task(client.reload(at_once))
        await is_closing.wait()
        monkeypatch.setattr(EngineLink, "close", close)
        await client.close()
        with pytest.raises(EngineUnavailableError):
            await reload
        assert {child.pid for child in children()} <= before


async def test_before_it_is_ready_requests_are_refused_with_a_time_to_come_back() -> None:
    async with fake_client() as client:
        assert client.status is EngineStatus.LOADING
        with pytest.raises(EngineUnavailableError) as refusal:
            await collect(client, request("a"))
        assert refusal.value.code == "engine_loading"
        assert refusal.value.retry_after_s >= 1


async def test_a_client_that_was_never_started_is_stopped() -> None:
    client = EngineClient(FAKE_CONFIG)
    assert (client.status, client.pid, client.info, client.stats) == (EngineStatus.STOPPED, None, None, None)
    with pytest.raises(EngineUnavailableError):
        await client.wait_ready()
    await client.close()


async def test_what_can_never_load_fails_at_once_with_its_reason() -> None:
    async with fake_client(model_path="damaged") as client:
        with pytest.raises(EngineUnavailableError, match=r"^(?!.*CheckpointError).*a tensor is missing"):
            await client.wait_ready()
        assert (client.status, client.num_restarts) == (EngineStatus.FAILED, 0)
        with pytest.raises(EngineUnavailableError) as refusal:
            await collect(client, request("a"))
        assert refusal.value.code == "engine_failed"
        assert "tensor" not in refusal.value.message, "reasons are for the operator"


@pytest.mark.parametrize(("behaviour", "reason"), [("no device", "no device today"), ("exits", str(EXIT_STATUS))])
async def test_loading_is_tried_a_few_times_and_then_given_up(behaviour: str, reason: str) -> None:
    async with fake_client(model_path=behaviour) as client:
        with pytest.raises(EngineUnavailableError, match=reason):
            await client.wait_ready()
        assert (client.status, client.num_restarts) == (EngineStatus.FAILED, MAX_LOAD_FAILURES - 1)


async def test_a_load_that_fails_once_is_made_good(tmp_path: Path) -> None:
    async with fake_client(model_path=f"flaky:{tmp_path / 'seen'}") as client:
        await client.wait_ready()
        assert client.num_restarts == 1


async def test_a_step_that_breaks_ends_everybody_once_and_the_engine_comes_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with fake_client() as client:
        await client.wait_ready()
        async with client.submit(request("bystander")) as stream:
            await anext(stream)
            broken = await collect(client, request("breaks", BREAKING_TOKEN, 31, 41))
            bystander = [event async for event in stream]
        for events in (broken, bystander):
            ends = [event for event in events if event.finish_reason is not None]
            assert len(ends) == 1
            assert ends[0].error is not None
            assert ends[0].error.code == "engine_restarting"
        await client.wait_ready()
        assert client.num_restarts == 1
        assert tokens_of(await collect(client, request("next", 8, max_tokens=3))) == expected_output((8,), 3)
    logged = capfd.readouterr().err
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith('{"')]
    failed = next(line for line in lines if line["event"] == "engine_step_failed")
    assert (failed["error"], failed["message"]) == ("RuntimeError", "the device is gone")
    assert "31, 41" not in logged


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_process_group_are_the_parents_to_handle(
    shared: EngineClient, number: signal.Signals
) -> None:
    assert shared.pid is not None
    async with shared.submit(request("a", max_tokens=None)) as stream:
        await anext(stream)
        os.kill(shared.pid, number)
        for _ in range(50):
            assert (await anext(stream)).finish_reason is None


async def test_an_engine_ends_when_its_parent_is_killed_and_tidies_up_after_it() -> None:
    program = (
        "import asyncio, sys\n"
        "from server.engine_client.client import EngineClient\n"
        "from tests.server.engine_client.test_engine_client import FAKE_CONFIG, MODULE\n"
        "async def main():\n"
        "    client = EngineClient(FAKE_CONFIG, module=MODULE)\n"
        "    await client.start()\n"
        "    await client.wait_ready()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TMPDIR": folder}
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, env=environment
        )
        assert parent.stdout is not None
        engine = psutil.Process(int(await parent.stdout.readline()))
        assert os.listdir(folder) != []
        parent.kill()
        await parent.wait()
        await asyncio.to_thread(engine.wait)
        assert not engine.is_running()
        assert os.listdir(folder) == []


async def test_a_real_model_survives_kill_9_in_mid_answer(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", with_tokenizer=False)
    client = EngineClient(replace(FAKE_CONFIG, model_path=str(path)))
    await client.start()
    try:
        await client.wait_ready()
        assert client.info is not None
        short = GenerationRequest("short", (1, 2, 3), SamplingParams(max_tokens=5, ignore_eos=True, seed=3))
        before = tokens_of(await collect(client, short))
        long = GenerationRequest("long", (1, 2, 3), SamplingParams(ignore_eos=True))
        async with client.submit(long) as stream:
            await anext(stream)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            events = [event async for event in stream]
            assert client.status is EngineStatus.RESTARTING
            with pytest.raises(EngineUnavailableError) as refusal:
                await collect(client, short)
        assert refusal.value.code == "engine_restarting"
        assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.ERROR]
        assert events[-1].error is not None
        assert events[-1].error.code == "engine_restarting"
        await client.wait_ready()
        assert client.num_restarts == 1
        assert tokens_of(await collect(client, short)) == before
    finally:
        await client.close()
