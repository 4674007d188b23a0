"""One engine process as its parent starts it."""

import asyncio
from itertools import repeat

import psutil
import pytest

from server.engine.process.messages import StepDone
from server.engine.types.requests import EngineConfig
from server.engine_client.link import EngineLink
from tests.server.engine_client.fake_process import MODULE
from tests.waiting import until_async

pytestmark = pytest.mark.anyio

CONFIG = EngineConfig(
    model_path="ok",
    device="cpu",
    weights_dtype="float32",
    num_threads=1,
    state_memory_bytes=2**20,
    max_num_slots=2,
    max_step_tokens=8,
    max_waiting=1,
)


async def environment_of_an_engine() -> dict[str, str]:
    link = await EngineLink.open(CONFIG, module=MODULE)
    try:
        assert link.pid is not None
        process = psutil.Process(link.pid)
        await until_async(lambda: MODULE in process.cmdline() and process.environ())  # before it is the parent's copy
        return process.environ()
    finally:
        await link.close()


@pytest.mark.parametrize("wanted", [None, "active"])
async def test_idle_tensor_threads_leave_their_core_to_the_kernels_unless_the_operator_says_otherwise(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wanted is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", wanted)
    environment = await environment_of_an_engine()
    assert environment["OMP_WAIT_POLICY"] == ("passive" if wanted is None else wanted)


async def test_an_engine_that_sends_faster_than_it_is_read_leaves_others_their_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = await EngineLink.open(CONFIG, module=MODULE)
    monkeypatch.setattr(link, "_arrived", lambda: repeat(StepDone([]), 10_000))  # as if there always were more
    num_read, read_at_turn = 0, []

    async def others() -> None:
        for _ in range(10):
            await asyncio.sleep(0)
            read_at_turn.append(num_read)

    try:
        turns = asyncio.create_task(others())
        async for _ in link.reports():
            num_read += 1
            if num_read == 10_000:
                break
        await turns
    finally:
        await link.close()
    assert read_at_turn[-1] < 10_000
