"""A wrong clock deletes nothing: only time that a monotonic clock confirms is time without use."""

import pytest

from server.errors import NotFoundError
from server.states.clock import GRACE_S
from tests.server.states.stores import Clock, Kind, make, put_response

pytestmark = pytest.mark.anyio
DAY_S = 86_400.0
TTL_S = 10 * DAY_S


async def test_a_clock_that_is_wrong_for_a_minute_costs_nothing(kind: Kind) -> None:
    wall, real = Clock(), Clock()
    store = kind.open(clock=wall, monotonic=real)
    states = {(await make(store, ttl_s=TTL_S, name="talk")).id}
    await put_response(store, "resp_1", "completed")
    for step in (40 * DAY_S, -40 * DAY_S, -40 * DAY_S, 40 * DAY_S):
        wall.now += step
        for state_id in states:
            assert (await store.get("ann", state_id)).id == state_id
        states.add((await make(store, ttl_s=TTL_S)).id)
        await kind.settle(store)
        for clock in (wall, real):
            clock.now += 60
        found = await store.list_states("ann", limit=9, after=None, name=None)
        assert {state.id for state in found} == states
    await store.close()


async def test_time_that_has_passed_still_counts_after_a_step(kind: Kind) -> None:
    wall, real = Clock(), Clock()
    store = kind.open(clock=wall, monotonic=real)
    state = await make(store, ttl_s=TTL_S)
    wall.now += 40 * DAY_S
    await kind.settle(store)
    for clock in (wall, real):
        clock.now += TTL_S + 1
    with pytest.raises(NotFoundError):
        await store.get("ann", state.id)
    await store.close()


@pytest.mark.parametrize("gap_s", [40 * DAY_S, -40 * DAY_S])
async def test_a_clock_that_is_wrong_at_the_start_costs_nothing(kind: Kind, gap_s: float) -> None:
    wall, real = Clock(), Clock()
    wall.now += 100 * DAY_S
    store = kind.open(clock=wall, monotonic=real)
    state = await make(store, ttl_s=TTL_S)
    await store.close()
    wall.now += gap_s
    store = kind.open(clock=wall, monotonic=real)
    await kind.settle(store)
    assert (await store.get("ann", state.id)).id == state.id
    wall.now -= gap_s
    await kind.settle(store)
    for clock in (wall, real):
        clock.now += 60
    await make(store)
    assert (await store.get("ann", state.id)).id == state.id
    await store.close()


async def test_a_server_that_was_off_for_long_believes_its_clock_after_an_hour(kind: Kind) -> None:
    wall, real = Clock(), Clock()
    store = kind.open(clock=wall, monotonic=real)
    state = await make(store, ttl_s=TTL_S)
    await store.close()
    for clock in (wall, real):
        clock.now += 40 * DAY_S
    store = kind.open(clock=wall, monotonic=real)
    await kind.settle(store)
    assert (await store.get("ann", state.id)).id == state.id
    for clock in (wall, real):
        clock.now += GRACE_S + 1
    with pytest.raises(NotFoundError):
        await store.get("ann", state.id)
    await store.close()
