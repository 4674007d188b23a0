"""Drafts in the scheduler: whatever is guessed, right or wrong, every request gets the tokens that it gets without."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.engine import Engine
from server.engine.speculation.rules import Speculation
from server.engine.types.requests import FinishReason, GenerationRequest
from tests.server.engine.fakes import EOS_TOKEN_ID, FREE, FakeRunner, GivenDrafts, engine, expected_output, request


def always(num_right: int) -> Iterator[int]:
    return itertools.repeat(num_right)


def finish(engine: Engine) -> dict[str, tuple[list[int], FinishReason]]:
    outputs: dict[str, list[int]] = {}
    ends = {}
    for _ in range(1_000):
        if not engine.has_work:
            break
        for event in engine.step():
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                ends[event.request_id] = (outputs[event.request_id], event.finish_reason)
    return ends


def run(
    requests: list[GenerationRequest], speculation: Speculation, *, max_step_tokens: int = 8, num_slots: int = 2
) -> FakeRunner:
    """Runs them, and checks that each gets its tokens."""
    runner = FakeRunner(max_step_tokens=max_step_tokens)
    core = engine(runner, speculation=speculation, max_step_tokens=max_step_tokens, num_slots=num_slots)
    for item in requests:
        assert core.add(item) is None
    ends = finish(core)
    for item in requests:
        limit = item.sampling.max_tokens
        assert limit is not None
        expected = expected_output(item.prompt_token_ids, limit)
        assert ends[item.request_id] == (expected, FinishReason.LENGTH)
    stats = core.stats
    assert stats.num_decode_tokens == sum((item.sampling.max_tokens or 0) - 1 for item in requests)
    assert 0 <= stats.num_accepted_tokens <= stats.num_drafted_tokens
    return runner


@given(
    prompts=st.lists(st.lists(st.integers(0, 48), min_size=1, max_size=12), min_size=1, max_size=5),
    limits=st.lists(st.integers(1, 14), min_size=5, max_size=5),
    num_right=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    max_step_tokens=st.integers(2, 12),
    num_slots=st.integers(1, 2),
)
def test_outputs_are_the_same_with_drafts_refused_at_any_place(
    prompts: list[list[int]], limits: list[int], num_right: list[int], max_step_tokens: int, num_slots: int
) -> None:
    requests = [request(f"r{n}", *prompt, max_tokens=limits[n]) for n, prompt in enumerate(prompts)]
    drafts = GivenDrafts(itertools.cycle(num_right), max_drafts=4)
    run(requests, drafts, max_step_tokens=max_step_tokens, num_slots=num_slots)


def test_drafts_that_are_right_save_steps() -> None:
    plain = run([request("a", max_tokens=13)], GivenDrafts(always(0), max_drafts=1))
    fast = run([request("a", max_tokens=13)], GivenDrafts(always(3), max_drafts=3))
    assert len(plain.batches) == 13
    assert len(fast.batches) == 4, "the prompt, then four tokens a step"


def test_repetition_is_drafted_without_anybody_telling() -> None:
    runner = FakeRunner()
    runner.scripted["a"] = [10, 11, 12, 13] * 10
    core = engine(runner, speculation=Speculation(4, FREE))
    core.add(request("a", 10, 11, 12, 13, max_tokens=40))
    ends = finish(core)
    assert ends["a"] == ([10, 11, 12, 13] * 10, FinishReason.LENGTH)
    assert len(runner.batches) < 15
    assert core.stats.num_accepted_tokens == 40 - len(runner.batches)


def test_an_end_token_ends_the_answer_behind_drafts_that_were_right() -> None:
    runner = FakeRunner()
    runner.scripted["a"] = [10, 11, 12, 13, 10, 11, EOS_TOKEN_ID]
    core = engine(runner, speculation=Speculation(4, FREE))
    core.add(request("a", 10, 11, 12, 13, max_tokens=40))
    assert finish(core)["a"] == ([10, 11, 12, 13, 10, 11, EOS_TOKEN_ID], FinishReason.STOP)
    assert core.stats.num_free_slots == 2


def test_a_fault_ends_the_request_with_the_tokens_before_it() -> None:
    runner = FakeRunner()
    core = engine(runner, speculation=GivenDrafts(always(2)))
    core.add(request("a", max_tokens=20))
    core.step()
    runner.faulty.add("a")
    [event] = core.step()
    assert event.error is not None
    assert event.error.code == "numerical_error"
    assert not core.has_work


def test_a_request_may_be_aborted_while_its_drafts_are_verified() -> None:
    runner = FakeRunner()
    core = engine(runner, num_ahead=1, speculation=GivenDrafts(always(2)))
    for name in ("a", "b"):
        core.add(request(name, max_tokens=20))
    for _ in range(4):
        core.step()
    assert core.abort("a") is not None
    ends = finish(core)
    assert list(ends) == ["b"]
    assert core.stats.num_free_slots == 2


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_steps_planned_ahead_wait_for_a_verification(num_ahead: int) -> None:
    runner = FakeRunner()
    core = engine(runner, num_ahead=num_ahead, speculation=GivenDrafts(always(1)))
    for name in ("a", "b"):
        core.add(request(name, max_tokens=15))
    expected = expected_output((1, 2, 3), 15)
    assert finish(core) == dict.fromkeys(("a", "b"), (expected, FinishReason.LENGTH))


def test_drafts_leave_room_for_every_other_request() -> None:
    drafts = GivenDrafts(always(3))
    runner = run([request(n, max_tokens=12) for n in ("a", "b", "c")], drafts, num_slots=3, max_step_tokens=4)
    assert all(sum(chunk.length for chunk in batch.chunks) <= 4 for batch in runner.batches)
    assert max(len(batch.chunks) for batch in runner.batches) == 3


def test_a_request_of_one_or_two_tokens_keeps_no_history() -> None:
    runner = FakeRunner()
    core = engine(runner, speculation=Speculation(4, FREE))
    for limit in (0, 1, 2, 3):
        core.add(request(f"r{limit}", max_tokens=limit))
    finish(core)
    drafters = {sequence.request_id: sequence.drafter is not None for sequence in runner.released}
    assert drafters == {"r0": False, "r1": False, "r2": False, "r3": True}


def test_followers_of_a_group_have_drafts_of_their_own() -> None:
    requests = [replace(request(f"r{n}", max_tokens=9), group="g") for n in range(3)]
    run(requests, GivenDrafts(itertools.cycle([0, 1, 2, 3])), num_slots=3, max_step_tokens=12)


@given(
    answer=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    prediction=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    ends=st.booleans(),
)
def test_a_prediction_changes_no_token_and_its_drafts_are_counted_one_by_one(
    answer: list[int], prediction: list[int], ends: bool
) -> None:
    answer = [*answer, EOS_TOKEN_ID] if ends else answer
    runner = FakeRunner()
    runner.scripted["a"] = [*answer]
    core = engine(runner, speculation=Speculation(4, FREE))
    core.add(replace(request("a", 20, 21, max_tokens=len(answer)), predicted_token_ids=tuple(prediction)))
    tokens: list[int] = []
    num_drafted = num_accepted = num_rejected = 0
    while core.has_work:
        drafted, accepted = core.stats.num_drafted_tokens, core.stats.num_accepted_tokens
        for event in core.step():
            before, tokens = tokens, [*tokens, *event.token_ids]
            num_accepted += event.num_accepted
            num_rejected += event.num_rejected
            if event.num_accepted or event.num_rejected:
                num_drafted += core.stats.num_drafted_tokens - drafted
                assert core.stats.num_accepted_tokens - accepted >= event.num_accepted
                followed = [*event.token_ids[: event.num_accepted]]
                assert any(prediction[at : at + len(followed)] == followed for at in range(len(prediction)))
                assert event.num_accepted < len(event.token_ids) or tokens == answer, (before, event)
    assert tokens == answer
    assert num_accepted + num_rejected == num_drafted


def test_a_right_prediction_saves_steps_from_the_first_token_on() -> None:
    runner = FakeRunner()
    answer = [*range(40)]
    runner.scripted["a"] = [*answer]
    core = engine(runner, speculation=Speculation(7, FREE))
    core.add(replace(request("a", 48, max_tokens=40), predicted_token_ids=tuple(answer)))
    accepted = 0
    while core.has_work:
        accepted += sum(event.num_accepted for event in core.step())
    assert len(runner.batches) == 6, "the prompt, then eight tokens a step"
    assert accepted == 40 - len(runner.batches)


def test_a_prediction_outside_of_the_vocabulary_is_refused() -> None:
    refused = engine(FakeRunner()).add(replace(request("a"), predicted_token_ids=(3, 10**6)))
    assert refused is not None
    assert refused.error is not None
    assert "predicted_token_ids" in refused.error.message


def test_requests_of_a_group_share_what_they_are_drafted_from() -> None:
    runner = FakeRunner()
    for name in ("a", "b"):
        runner.scripted[name] = [10, 11, 12, 13, 14, 15, 16, 17]
    core = engine(runner, speculation=Speculation(4, FREE))
    for name in ("a", "b"):
        item = replace(request(name, 1, 2, max_tokens=8), group="g", predicted_token_ids=(10, 11, 12, 13, 14, 15))
        core.add(item)
    ends = finish(core)
    assert ends == dict.fromkeys(("a", "b"), ([10, 11, 12, 13, 14, 15, 16, 17], FinishReason.LENGTH))
    assert core.stats.num_accepted_tokens >= 8
