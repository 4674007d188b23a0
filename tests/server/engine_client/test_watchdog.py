"""An engine that is there and does nothing is ended and started again; what had not begun goes to the next process."""

import asyncio
import os
import signal
from dataclasses import replace

import psutil
import pytest

from server.engine.types.requests import FinishReason, Tenant
from server.engine_client.client import EngineStatus
from server.engine_client.watchdog import STEPS, Watchdog
from server.errors import EngineUnavailableError, RateLimitError
from tests.server.engine.fakes import expected_output, request
from tests.server.engine_client.test_engine_client import collect, fake_client, tokens_of
from tests.waiting import until_async

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hung", "dead"])
async def test_who_had_begun_in_a_process_that_fails_ends_and_who_waited_is_answered_by_the_next(
    number: signal.Signals,
) -> None:
    async with fake_client(heartbeat_s=0.5) as client:
        await client.wait_ready()
        failed = client.pid
        assert failed is not None
        async with client.submit(request("1")) as first, client.submit(request("2")) as second:
            await anext(first)
            await anext(second)
            waiting = asyncio.create_task(collect(client, request("waits", 8, max_tokens=5)))
            await until_async(lambda: client.num_requests == 3)
            os.kill(failed, number)
            ends = [[event async for event in stream][-1] for stream in (first, second)]
            assert client.status is EngineStatus.RESTARTING
            with pytest.raises(EngineUnavailableError):
                await collect(client, request("too early", 3))
        for end in ends:
            assert end.error is not None
            assert end.error.code == "engine_restarting"
        assert tokens_of(await waiting) == expected_output((8,), 5)
        assert (client.num_restarts, client.status) == (1, EngineStatus.READY)
        assert not psutil.pid_exists(failed)


async def test_an_idle_engine_that_is_stopped_is_noticed_too() -> None:
    async with fake_client(heartbeat_s=0.5) as client:
        await client.wait_ready()
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await until_async(lambda: client.status is EngineStatus.RESTARTING)
        await client.wait_ready()
        assert tokens_of(await collect(client, request("next", 8, max_tokens=3))) == expected_output((8,), 3)


async def test_a_request_that_two_processes_lost_ends() -> None:
    async with fake_client() as client:
        await client.wait_ready()
        async with client.submit(request("1")) as first, client.submit(request("2")) as second:
            await anext(first)
            await anext(second)
            lost = asyncio.create_task(collect(client, request("lost", max_tokens=1)))
            await until_async(lambda: client.num_requests == 3)
            for submission in client._submissions._by_name.values():
                submission.num_processes += submission.request.request_id == "lost"
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            assert (await lost)[-1].finish_reason is FinishReason.ERROR
        await client.wait_ready()


async def test_a_request_that_waits_for_the_next_process_can_be_left_and_suspended() -> None:
    async with fake_client() as client:
        await client.wait_ready()
        async with client.submit(request("1")) as first, client.submit(request("2")) as second:
            await anext(first)
            await anext(second)
            async with client.submit(request("waits")) as stream:
                assert client.pid is not None
                os.kill(client.pid, signal.SIGKILL)
                await until_async(lambda: client.status is EngineStatus.RESTARTING)
                client.suspend("waits", save_to=None, note="", in_prompt=True)
                assert [event.finish_reason async for event in stream] == [FinishReason.SUSPENDED]
        await client.wait_ready()
        assert client.num_requests == 0


async def test_silence_is_measured_by_the_longest_step_too() -> None:
    asked = []
    watchdog = Watchdog(0.02, ask=lambda: asked.append(1), longest_step_s=lambda: 0.02)
    assert await watchdog.silence() >= STEPS * 0.02
    assert len(asked) == 1, "nobody is asked again before having answered"


async def test_a_key_has_its_own_limits_before_anything_is_sent() -> None:
    few = Tenant("few", max_running=1, max_waiting=1)
    short = Tenant("short", max_waiting_tokens=10)
    async with fake_client(max_waiting=20, reserved_waiting=5) as client:
        await client.wait_ready()
        async with (
            client.submit(replace(request("1"), tenant=few)),
            client.submit(replace(request("2"), tenant=few)),
            client.submit(replace(request("3", *range(30)), tenant=short)),
        ):
            with pytest.raises(RateLimitError, match="2 requests of this key are running or queued, limit 2"):
                await collect(client, replace(request("4"), tenant=few))
            await until_async(lambda: client.stats is not None and client.stats.num_running == 2)
            async with client.submit(replace(request("5", *range(40)), tenant=short)):
                with pytest.raises(RateLimitError, match="43 prompt tokens of this key would be queued, limit 10"):
                    await collect(client, replace(request("6"), tenant=short))
