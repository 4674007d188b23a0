"""Slots, queue places and prompt tokens among tenants and among prompts, on a scheduler without a model."""

from collections import Counter
from dataclasses import replace

import pytest

from server.engine.engine import Engine
from server.engine.fairness import shares
from server.engine.fairness.step_times import LEAST_TOKENS, StepTimes
from server.engine.scheduler import Scheduler
from server.engine.types.requests import GenerationRequest, Tenant, TokenEvent
from tests.server.engine.fakes import FakeRunner, engine, expected_output, request, scheduler

A, B, C = Tenant("a"), Tenant("b"), Tenant("c")


def of(tenant: Tenant, name: str, *prompt: int, priority: int = 0, **sampling: object) -> GenerationRequest:
    return replace(request(name, *prompt, **sampling), tenant=tenant, priority=priority)


def long_of(tenant: Tenant, name: str, num_tokens: int) -> GenerationRequest:
    return of(tenant, name, *(number % 40 for number in range(num_tokens)), max_tokens=1)


def plan(subject: Scheduler) -> dict[str, int]:
    """Tokens of each request in the next step, which is committed."""
    batch = subject.next_batch()
    assert batch is not None
    subject.commit(batch, [7] * len(batch.sampled), [False] * len(batch.sampled))
    return {chunk.sequence.request_id: chunk.length for chunk in batch.chunks}


def running(subject: Scheduler) -> Counter[str]:
    return Counter(sequence.tenant.name for sequence in subject.running)


def steps_until_token(core: Engine, name: str) -> int:
    """Steps until a request has its first token."""
    for number in range(1, 10_000):
        if any(event.request_id == name and event.token_ids for event in core.step()):
            return number
    raise AssertionError("it has none")


@pytest.mark.parametrize("tenant", [A, B], ids=["of the same tenant", "of another one"])
def test_a_short_prompt_beside_a_long_one_has_its_first_token_within_a_few_steps(tenant: Tenant) -> None:
    core = engine(FakeRunner())
    core.add(long_of(A, "long", 2_000))
    core.step()
    core.add(of(tenant, "short", *range(10), max_tokens=1))
    assert steps_until_token(core, "short") <= 4
    assert steps_until_token(core, "long") < 2_000 / 8 + 4, "and the long one loses no more than that"


def test_a_short_prompt_passes_several_long_ones_and_the_oldest_of_them_never_stops() -> None:
    subject = scheduler(num_slots=8)
    for number in range(3):
        subject.add(long_of(A, f"long{number}", 2_000))
    plan(subject)
    for number in range(20):
        subject.add(of(A, f"short{number}", *range(8), max_tokens=1))
        assert plan(subject)["long0"] >= 4


def test_prompts_of_tenants_are_read_by_weight() -> None:
    subject = scheduler(num_slots=3, max_step_tokens=64)
    for tenant, weight in ((A, 1), (B, 1), (C, 2)):
        subject.add(long_of(replace(tenant, weight=weight), f"{tenant.name}1", 4_000))
    read: Counter[str] = Counter()
    for _ in range(50):
        read.update(plan(subject))
    assert read == {"a1": 800, "b1": 800, "c1": 1_600}


def test_a_step_of_few_tokens_goes_to_one_tenant_after_the_other() -> None:
    subject = scheduler(num_slots=3, max_step_tokens=3)
    for tenant in (A, B, C):
        subject.add(long_of(tenant, tenant.name, 3_000))
    read: Counter[str] = Counter()
    for _ in range(48):
        read.update(plan(subject))
    assert read == {"a": 48, "b": 48, "c": 48}


def test_who_was_away_has_saved_no_turns_up() -> None:
    subject = scheduler(num_slots=3, max_step_tokens=32)
    for tenant in (A, B):
        subject.add(long_of(tenant, tenant.name, 6_000))
    for _ in range(100):
        plan(subject)
    subject.add(long_of(C, "c", 3_000))
    read: Counter[str] = Counter()
    for _ in range(30):
        read.update(plan(subject))
    assert read == {"a": 320, "b": 320, "c": 320}


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_a_tenant_that_holds_all_slots_gives_one_up_and_goes_on_with_the_same_tokens(num_ahead: int) -> None:
    core = engine(FakeRunner(), num_slots=3, num_ahead=num_ahead)
    events: dict[str, list[TokenEvent]] = {name: [] for name in ("a0", "a1", "a2", "b")}
    for number in range(3):
        core.add(of(A, f"a{number}", 4, number, max_tokens=30))
    for _ in range(5):
        for event in core.step():
            events[event.request_id].append(event)
    core.add(of(B, "b", 5, 6, max_tokens=4))
    first_b = None
    for number in range(1_000):
        if not core.has_work:
            break
        for event in core.step():
            events[event.request_id].append(event)
            first_b = number if event.request_id == "b" and first_b is None else first_b
    assert first_b is not None
    assert first_b <= 2 + num_ahead
    assert core.stats.num_preemptions == 1
    for name, prompt, length in (("a0", (4, 0), 30), ("a1", (4, 1), 30), ("a2", (4, 2), 30), ("b", (5, 6), 4)):
        tokens = [token for event in events[name] for token in event.token_ids]
        assert tokens == expected_output(prompt, length)
        assert sum(event.num_cached_tokens for event in events[name]) == 0


@pytest.mark.parametrize("max_parked", [0, 1, 2])
def test_no_more_slots_are_taken_than_there_is_memory_for_their_states(max_parked: int) -> None:
    subject = scheduler(num_slots=4, max_step_tokens=64, max_parked=max_parked)
    for number in range(4):
        subject.add(of(A, f"a{number}", 1, 2))
    plan(subject)
    for number in range(3):
        subject.add(of(Tenant(f"t{number}"), f"t{number}", 1))
    for _ in range(5):
        plan(subject)
    assert subject.num_parked == max_parked
    assert running(subject)["a"] == 4 - max_parked
    for name in ("a0", "a1", "a2", "a3"):
        subject.abort(name)
    assert subject.num_parked == 0
    plan(subject)
    assert subject.num_running == 3, "who waited has the slots that are free"


def test_who_takes_an_own_slot_back_needs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "QUANTUM", 6)
    subject = scheduler(num_slots=1, max_parked=1)
    for tenant in (A, B, C):
        subject.add(of(tenant, tenant.name, 1, 2))
    had: Counter[str] = Counter()
    for _ in range(60):
        had.update(plan(subject))
        assert subject.num_parked <= 1
    assert had["a"] > 20
    assert had["b"] > 20
    assert had["c"] == 0, "it waits for a slot that is free"
    subject.abort("a")
    subject.abort("b")
    assert plan(subject) == {"c": 2}


def test_a_slot_is_taken_only_from_who_has_more_and_by_weight() -> None:
    subject = scheduler(num_slots=4)
    for number in range(8):
        subject.add(of(A, f"a{number}"))
    plan(subject)
    for number in range(8):
        subject.add(of(replace(B, weight=3), f"b{number}"))
    for _ in range(5):
        plan(subject)
    assert running(subject) == {"a": 1, "b": 3}
    subject.add(of(C, "c"))
    plan(subject)
    assert running(subject) == {"a": 1, "b": 2, "c": 1}


def test_free_slots_go_to_who_has_least_and_all_of_them_to_one_who_is_alone() -> None:
    subject = scheduler(num_slots=4, max_step_tokens=64)
    for number in range(4):
        subject.add(of(A, f"a{number}"))
    for number in range(4):
        subject.add(of(B, f"b{number}"))
    plan(subject)
    assert running(subject) == {"a": 2, "b": 2}
    alone = scheduler(num_slots=4, max_step_tokens=64)
    for number in range(4):
        alone.add(of(A, f"a{number}"))
    plan(alone)
    assert running(alone) == {"a": 4}


def test_more_tenants_than_slots_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "QUANTUM", 6)
    subject = scheduler(num_slots=2)
    for tenant in (A, B, C):
        subject.add(of(tenant, tenant.name, 1, 2))
    had: Counter[str] = Counter()
    for _ in range(120):
        had.update(plan(subject))
    assert min(had.values()) > 60, "each has two thirds of the steps, more or less"


def test_a_tenant_at_its_own_limit_waits_beside_free_slots() -> None:
    subject = scheduler(num_slots=4, max_step_tokens=64)
    limited = replace(A, max_running=2)
    for number in range(3):
        subject.add(of(limited, f"a{number}", max_tokens=2))
    plan(subject)
    assert (running(subject), subject.num_waiting, subject.num_free_slots) == ({"a": 2}, 1, 2)
    plan(subject)
    assert plan(subject).keys() == {"a2"}


def refused(event: TokenEvent | None) -> str | None:
    if event is None:
        return None
    assert event.error is not None
    assert event.error.code == "overloaded"
    return event.error.message


def test_the_last_places_in_the_queue_are_for_those_who_have_nothing_there() -> None:
    subject = scheduler(num_slots=1, max_waiting=4, reserved_waiting=2)
    subject.add(of(A, "runs"))
    plan(subject)
    assert [refused(subject.add(of(A, f"a{number}"))) for number in range(2)] == [None, None]
    assert refused(subject.add(of(A, "a2"))) == "at capacity: 1 requests running, 2 queued, limit 2"
    assert refused(subject.add(of(B, "b0"))) is None
    assert refused(subject.add(of(B, "b1"))) is not None
    assert refused(subject.add(of(C, "c0"))) is None
    assert refused(subject.add(of(Tenant("d"), "d0"))) == "at capacity: 1 requests running, 4 queued, limit 4"


def test_a_tenants_own_limits_of_requests_and_tokens_in_the_queue() -> None:
    subject = scheduler(num_slots=1)
    subject.add(of(C, "runs"))
    plan(subject)
    few, short = replace(A, max_waiting=1), replace(B, max_waiting_tokens=10)
    assert refused(subject.add(of(few, "a0"))) is None
    assert refused(subject.add(of(few, "a1"))) == "at this key's capacity: 1 requests queued, limit 1"
    assert refused(subject.add(of(short, "b0", *range(30)))) is None, "one is always taken"
    assert refused(subject.add(of(short, "b1"))) == "at this key's capacity: 30 prompt tokens queued, limit 10"


def test_priority_counts_within_a_tenant_unless_it_outranks_the_others() -> None:
    subject = scheduler(num_slots=1)
    subject.add(of(C, "runs", max_tokens=1))
    subject.add(of(A, "a", max_tokens=1))
    subject.add(of(B, "b late", max_tokens=1))
    subject.add(of(B, "b first", max_tokens=1, priority=-5))
    assert [[*plan(subject)] for _ in range(4)] == [["runs"], ["a"], ["b first"], ["b late"]]
    subject.add(of(C, "runs", max_tokens=1))
    subject.add(of(A, "a", max_tokens=1))
    subject.add(of(replace(B, outranks=True), "b", max_tokens=1, priority=-1))
    assert [[*plan(subject)] for _ in range(3)] == [["b"], ["runs"], ["a"]]


def test_prompts_take_no_more_of_a_step_than_the_gap_of_answers_allows() -> None:
    times = StepTimes(0.1)
    assert times.prompt_tokens(3) is None, "nothing is known yet"
    for _ in range(30):
        times.observe(2, 0, 0.02)
        times.observe(2, 100, 0.02 + 100 * 0.001)
    assert times.prompt_tokens(0) == pytest.approx(100, abs=1), "whoever comes meanwhile waits for the step's end"
    assert times.prompt_tokens(2) == pytest.approx(80, abs=1)
    times.observe(2, 100, 60.0)
    assert times.prompt_tokens(2) >= 60, "a step that was held up once counts no more than twice the mean"
    for _ in range(60):
        times.observe(2, 0, 0.5)
        times.observe(2, 100, 0.5 + 100 * 0.001)
    assert times.prompt_tokens(2) == pytest.approx(500, abs=5), "where answers alone take longer, prompts have half"
    for _ in range(60):
        times.observe(2, 100, 0.5 + 100 * 0.1)
    assert times.prompt_tokens(2) == LEAST_TOKENS


def test_a_scheduler_cuts_prompts_by_the_time_that_it_is_told() -> None:
    subject = scheduler(num_slots=2, max_step_tokens=400, step_times=StepTimes(0.1))
    subject.add(of(A, "answers"))
    batch = subject.next_batch()
    assert batch is not None
    subject.commit(batch, [7], [False])
    subject.observe(batch, 3 * 0.001)
    subject.add(long_of(B, "long", 1_000))
    assert plan(subject)["long"] == 100
    subject.abort("answers")
    assert plan(subject)["long"] == 100, "whoever comes meanwhile waits for no more"
    subject.add(of(C, "short", *range(10)))
    assert plan(subject) == {"long": 40, "short": 10}, "a first token need not wait for what can be read later"
    subject.abort("short")
    subject.add(of(C, "not so short", *range(30)))
    assert plan(subject) == {"long": 70, "not so short": 30}
