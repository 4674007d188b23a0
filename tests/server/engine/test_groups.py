"""Several answers to one prompt by one prefill, and the order in which requests get slots."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.types.requests import FinishReason, GenerationRequest, TokenEvent
from tests.server.engine.fakes import FakeRunner, engine, expected_output, request
from tests.server.engine.some_requests import make_request
from tests.server.engine.test_engine_model import Bench
from tests.tiny_models import tiny_network

PROMPT = tuple(range(20))


def choices(
    num: int, *, prompt: tuple[int, ...] = PROMPT, group: str = "g", **sampling: object
) -> list[GenerationRequest]:
    return [replace(request(f"{group}{n}", *prompt, **{"max_tokens": 4, **sampling}), group=group) for n in range(num)]


def run(runner: FakeRunner, requests: list[GenerationRequest], **changes: object) -> dict[str, list[TokenEvent]]:
    core = engine(runner, **changes)  # type: ignore[arg-type]
    events: dict[str, list[TokenEvent]] = {item.request_id: [] for item in requests}
    for item in requests:
        assert core.add(item) is None
    while core.has_work:
        for event in core.step():
            events[event.request_id].append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_a_prompt_is_computed_once_for_all_its_answers(num_ahead: int) -> None:
    runner = FakeRunner()
    events = run(runner, choices(4), num_slots=4, num_ahead=num_ahead)
    assert sum(batch.num_prefill_tokens for batch in runner.batches) == len(PROMPT) - 1 + 4
    for mine in events.values():
        assert tokens(mine) == expected_output(PROMPT, 4)
        assert [event.finish_reason for event in mine][-1] is FinishReason.LENGTH
        assert all(event.num_cached_tokens == 0 for event in mine)


def test_answers_without_a_slot_share_a_prefill_later() -> None:
    runner = FakeRunner()
    events = run(runner, choices(5), num_slots=2)
    assert all(tokens(mine) == expected_output(PROMPT, 4) for mine in events.values())
    # Pairs (leader, copy), (leader, copy), and the last one alone.
    assert sum(batch.num_prefill_tokens for batch in runner.batches) == 3 * (len(PROMPT) - 1) + 5


def test_a_prompt_of_one_token_has_nothing_to_share() -> None:
    runner = FakeRunner()
    events = run(runner, choices(3, prompt=(7,)), num_slots=4)
    assert all(tokens(mine) == expected_output((7,), 4) for mine in events.values())
    assert len(runner.batches) == 4


def test_others_run_while_a_group_waits_for_its_leader() -> None:
    runner = FakeRunner()
    events = run(runner, [*choices(2), request("other", 3, max_tokens=1)], num_slots=4)
    assert tokens(events["other"]) == expected_output((3,), 1)
    served = [chunk.sequence.request_id for batch in runner.batches for chunk in batch.sampled]
    assert served[0] == "other"


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("victim", ["g0", "g1"])
def test_a_choice_that_is_aborted_in_any_phase_takes_no_other_with_it(num_steps: int, victim: str) -> None:
    runner = FakeRunner()
    core = engine(runner, num_slots=3)
    ends: Counter[str] = Counter()
    outputs: dict[str, list[int]] = {}
    for item in choices(3):
        core.add(item)
    events: list[TokenEvent] = []
    for _ in range(num_steps):
        events += core.step()
    aborted = core.abort(victim)
    events += [] if aborted is None else [aborted]
    while core.has_work:
        events += core.step()
    for event in events:
        outputs.setdefault(event.request_id, []).extend(event.token_ids)
        ends[event.request_id] += event.finish_reason is not None
    assert ends == {"g0": 1, "g1": 1, "g2": 1}
    for name in {"g0", "g1", "g2"} - {victim}:
        assert outputs[name] == expected_output(PROMPT, 4)
    assert core.stats.num_free_slots == 3


@given(
    num=st.integers(1, 6),
    num_slots=st.integers(1, 5),
    max_step_tokens=st.integers(5, 40),
    length=st.integers(1, 30),
    others=st.integers(0, 4),
    num_ahead=st.integers(0, 1),
)
def test_whatever_shares_a_prefill_gets_what_it_would_get_alone(
    num: int, num_slots: int, max_step_tokens: int, length: int, others: int, num_ahead: int
) -> None:
    prompt = tuple(range(length))
    group = choices(num, prompt=prompt)
    beside = [request(f"o{n}", *range(n, n + 9), max_tokens=3) for n in range(others)]
    mixed = [item for pair in zip(group, beside, strict=False) for item in pair]
    mixed += group[len(beside) :] + beside[len(group) :]
    runner = FakeRunner(max_step_tokens=max_step_tokens)
    events = run(runner, mixed, num_slots=num_slots, max_step_tokens=max_step_tokens, num_ahead=num_ahead)
    for item in mixed:
        expected = expected_output(item.prompt_token_ids, item.sampling.max_tokens or 0)
        assert tokens(events[item.request_id]) == expected
        assert sum(event.finish_reason is not None for event in events[item.request_id]) == 1


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_choices_of_a_model_are_those_of_separate_requests(num_slots: int) -> None:
    model = tiny_network()
    separate = [replace(make_request("x", 40, seed=0), request_id=f"c{n}") for n in range(6)]
    separate = [
        replace(item, sampling=replace(item.sampling, temperature=1.0, seed=11 + n, repetition_penalty=1.1))
        for n, item in enumerate(separate)
    ]
    together = [replace(item, group="prompt") for item in separate]
    bench = Bench(model, num_slots=num_slots)
    bench.poison(range(1, num_slots + 1))
    assert bench.run(together) == Bench(model, num_slots=1, max_step_tokens=256).run(separate)


def test_lower_priorities_run_first_and_equal_ones_in_order_of_arrival() -> None:
    runner = FakeRunner()
    waiting = [
        replace(request(name, 1, 2, max_tokens=1), priority=priority)
        for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1))
    ]
    run(runner, waiting, num_slots=1)
    assert [batch.chunks[0].sequence.request_id for batch in runner.batches] == ["c", "e", "a", "d", "b"]


def test_a_waiting_request_of_any_priority_can_be_aborted() -> None:
    core = engine(FakeRunner(), num_slots=1)
    for name, priority in (("a", 0), ("b", 3), ("c", -3), ("d", 3)):
        core.add(replace(request(name, max_tokens=1), priority=priority))
    assert core.abort("b") is not None
    assert core.abort("b") is None
    ended = [event.request_id for _ in range(3) for event in core.step() if event.finish_reason is not None]
    assert ended == ["c", "a", "d"]
