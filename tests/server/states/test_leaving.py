"""Clients that leave in every phase of an answer whose state is to be kept: no file, no slot, no room is lost."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx

from tests.server.states.running import ANN, Running, bearer, running
from tests.waiting import PATIENCE_S, until


async def ask(http: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> str | None:
    """The state's id, or None if the client has left after so many lines."""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        number = 0
        found: str | None = None
        async for line in response.aiter_lines():
            if number == leave_after:
                return None
            number += 1
            if '"state_id":"' in line:
                found = line.split('"state_id":"')[1].split('"')[0]
        return found


async def rush(server: Running, base: str, rng: random.Random) -> list[str]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=server.base_url, headers=bearer(ANN), timeout=PATIENCE_S, limits=limits, trust_env=False
    ) as http:
        tasks = []
        for number in range(60):
            body: dict[str, Any] = {
                "prompt": f"number {number}",
                "stream": True,
                "return_state": True,
                "temperature": 0,
            }
            body["max_tokens"] = rng.choice([1, 5, 30])
            if number % 3 == 0:
                body["state_id"] = base
            if number % 4 == 0:
                body["stop"] = ["e", "t", "5"]
            tasks.append(ask(http, body, rng.choice([None, None, 0, 1, 3])))
        return [state_id for state_id in await asyncio.gather(*tasks) if state_id is not None]


def test_nothing_is_lost_when_clients_leave(tiny: Path, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "states", "--max-conversations", "8") as server:
        base = server.post("/v1/states", prompt="The past of them all.")["id"]
        kept = asyncio.run(rush(server, base, random.Random(3)))
        assert len(kept) > 10
        files = tmp_path / "states" / "files"
        until(lambda: server.gauge("dijiang_num_requests_running") + server.gauge("dijiang_num_requests_waiting") == 0)
        until(lambda: len([*files.iterdir()]) == server.gauge("dijiang_saved_states"))
        ids = {state["id"] for state in server.get("/v1/states?limit=100")["data"]}
        assert {*kept} <= ids
        for state_id in ids:
            assert server.http.delete(f"/v1/states/{state_id}").status_code == 200
        until(lambda: [*files.iterdir()] == [])  # whoever has written one may not have let go of it yet
        assert server.gauge("dijiang_slots_free") == 8


def test_only_one_of_many_that_advance_a_state_at_once_wins(server: Running) -> None:
    base = server.post("/v1/states", prompt="Contested.")

    async def race() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=server.base_url, headers=bearer(ANN), timeout=PATIENCE_S, trust_env=False
        ) as http:
            body = {"prompt": "!", "state_id": base["id"], "max_tokens": 20, "return_state": {"update": True}}
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(6)))

    responses = asyncio.run(race())
    statuses = sorted(response.status_code for response in responses)
    assert statuses[0] == 200
    assert {*statuses} <= {200, 409}
    now = server.get(f"/v1/states/{base['id']}")["num_tokens"]
    winners = [response.json()["usage"]["total_tokens"] for response in responses if response.status_code == 200]
    assert now in winners
