"""Who runs when: admission, chunked prefill, ends, refusals."""

import pytest

from server.engine.batch import Batch
from server.engine.scheduler import Scheduler
from server.engine.types.requests import FinishReason, SamplingParams, TokenEvent
from tests.server.engine.fakes import EOS_TOKEN_ID, VOCAB_SIZE, request, scheduler

OK_TOKEN = 7


def shape(batch: Batch | None) -> list[tuple[str, int, int]]:
    """(request, start, length) of each chunk."""
    assert batch is not None
    return [(chunk.sequence.request_id, chunk.start, chunk.length) for chunk in batch.chunks]


def step(subject: Scheduler, token_id: int = OK_TOKEN) -> list[TokenEvent]:
    batch = subject.next_batch()
    assert batch is not None
    return subject.commit(batch, [token_id] * len(batch.sampled), [False] * len(batch.sampled))


def run_until_end(subject: Scheduler, token_id: int = OK_TOKEN) -> list[TokenEvent]:
    events = []
    while subject.has_unfinished:
        events += step(subject, token_id)
    return events


def test_a_long_prompt_is_fed_over_several_steps_and_samples_only_at_its_end() -> None:
    subject = scheduler()
    subject.add(request("a", *range(1, 21), max_tokens=1))
    for wanted in ([("a", 0, 8)], [("a", 8, 8)]):
        batch = subject.next_batch()
        assert shape(batch) == wanted
        assert batch is not None
        assert batch.sampled == ()
        assert subject.commit(batch, [], []) == []
    batch = subject.next_batch()
    assert shape(batch) == [("a", 16, 4)]
    assert batch is not None
    assert subject.commit(batch, [OK_TOKEN], [False]) == [TokenEvent("a", (OK_TOKEN,), FinishReason.LENGTH)]


def test_several_prompts_share_a_step_in_the_order_they_came() -> None:
    subject = scheduler(num_slots=4)
    for name, length in (("a", 3), ("b", 2), ("c", 9)):
        subject.add(request(name, *range(length)))
    assert shape(subject.next_batch()) == [("a", 0, 3), ("b", 0, 2), ("c", 0, 3)]


def test_decoding_comes_first_and_prompts_get_what_is_left() -> None:
    subject = scheduler()
    subject.add(request("a"))
    step(subject)
    subject.add(request("b", *range(20)))
    batch = subject.next_batch()
    assert shape(batch) == [("a", 3, 1), ("b", 0, 7)]
    assert batch is not None
    assert batch.num_decode == 1
    assert batch.num_prefill_tokens == 7


def test_everybody_moves_on_when_slots_and_step_tokens_are_equal() -> None:
    subject = scheduler(num_slots=3, max_step_tokens=3)
    for name in "abc":
        subject.add(request(name, 1, 2, 3, 4))
    decoded: dict[str, int] = dict.fromkeys("abc", 0)
    for _ in range(12):
        for event in step(subject):
            decoded[event.request_id] += 1
    assert decoded["a"] == 11, "the first one decodes in every step after its prompt"
    assert all(count > 0 for count in decoded.values())


def test_more_slots_than_step_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="9 slots need steps of at least as many tokens, not 8"):
        scheduler(num_slots=9)


def test_a_negative_queue_is_refused() -> None:
    with pytest.raises(ValueError, match="max_waiting"):
        scheduler(max_waiting=-1)


def test_waiting_requests_are_admitted_first_come_first_served() -> None:
    subject = scheduler(num_slots=1)
    for name in "abc":
        subject.add(request(name, max_tokens=1))
    assert (subject.num_running, subject.num_waiting) == (0, 3)
    assert [event.request_id for event in run_until_end(subject)] == ["a", "b", "c"]


def test_a_request_beyond_the_queue_ends_at_once_as_overloaded() -> None:
    subject = scheduler(num_slots=1, max_waiting=1)
    assert subject.add(request("runs")) is None
    assert subject.add(request("waits")) is None
    event = subject.add(request("refused"))
    assert event is not None
    assert event.finish_reason is FinishReason.ERROR
    assert event.error is not None
    assert event.error.code == "overloaded"
    step(subject)
    assert subject.add(request("refused")) is not None
    subject.abort("waits")
    assert subject.add(request("taken")) is None


def test_without_a_queue_a_free_slot_is_still_given() -> None:
    subject = scheduler(num_slots=2, max_waiting=0)
    assert [subject.add(request(name)) is None for name in "abc"] == [True, True, False]


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_an_abort_in_any_phase_ends_once_and_frees_the_slot(steps_before: int) -> None:
    subject = scheduler(num_slots=1)
    subject.add(request("a", *range(10)))
    for _ in range(steps_before):
        step(subject)
    assert subject.abort("a") == TokenEvent("a", finish_reason=FinishReason.ABORT)
    assert subject.abort("a") is None
    assert not subject.has_unfinished
    assert subject.num_free_slots == 1
    assert subject.next_batch() is None
    assert len(subject.take_ended()) == (1 if steps_before else 0)


def test_an_abort_between_plan_and_commit_swallows_the_token() -> None:
    subject = scheduler()
    subject.add(request("a"))
    batch = subject.next_batch()
    assert batch is not None
    subject.abort("a")
    assert subject.commit(batch, [OK_TOKEN], [False]) == []


def test_a_step_can_be_planned_before_the_last_one_is_committed() -> None:
    subject = scheduler()
    subject.add(request("a", max_tokens=2))
    first, second, third = subject.next_batch(), subject.next_batch(), subject.next_batch()
    assert first is not None
    assert second is not None
    assert (shape(first), shape(second)) == ([("a", 0, 3)], [("a", 3, 1)])
    assert third is None, "no step is planned beyond max_tokens"
    assert [chunk.output_index for batch in (first, second) for chunk in batch.sampled] == [0, 1]
    assert subject.commit(first, [EOS_TOKEN_ID], [False])[0].finish_reason is FinishReason.STOP
    assert subject.commit(second, [OK_TOKEN], [False]) == [], "its row was run for nothing"


def test_end_of_sequence_ends_and_is_part_of_the_tokens() -> None:
    subject = scheduler()
    subject.add(request("a"))
    assert step(subject, EOS_TOKEN_ID) == [TokenEvent("a", (EOS_TOKEN_ID,), FinishReason.STOP)]


def test_a_stop_token_ends() -> None:
    subject = scheduler()
    subject.add(request("a", stop_token_ids=(OK_TOKEN,)))
    assert step(subject)[0].finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on_but_keeps_stop_tokens() -> None:
    subject = scheduler()
    subject.add(request("a", ignore_eos=True, stop_token_ids=(OK_TOKEN,)))
    assert step(subject, EOS_TOKEN_ID)[0].finish_reason is None
    assert step(subject, OK_TOKEN)[0].finish_reason is FinishReason.STOP


def test_stop_wins_over_length_on_the_same_token() -> None:
    subject = scheduler()
    subject.add(request("a", max_tokens=1))
    assert step(subject, EOS_TOKEN_ID)[0].finish_reason is FinishReason.STOP


def test_no_limit_means_no_limit() -> None:
    subject = scheduler()
    subject.add(request("a", max_tokens=None))
    for _ in range(500):
        assert step(subject)[0].finish_reason is None


def test_an_end_token_before_min_tokens_does_not_end() -> None:
    subject = scheduler()
    subject.add(request("a", min_tokens=2))
    assert [step(subject, EOS_TOKEN_ID)[0].finish_reason for _ in range(3)] == [None, None, FinishReason.STOP]


def test_a_faulty_row_ends_its_request_alone() -> None:
    subject = scheduler()
    subject.add(request("bad"))
    subject.add(request("good"))
    batch = subject.next_batch()
    assert batch is not None
    bad, good = subject.commit(batch, [0, OK_TOKEN], [True, False])
    assert (bad.request_id, bad.token_ids, bad.finish_reason) == ("bad", (), FinishReason.ERROR)
    assert bad.error is not None
    assert bad.error.code == "numerical_error"
    assert good == TokenEvent("good", (OK_TOKEN,))
    assert [sequence.request_id for sequence in subject.take_ended()] == ["bad"]


def test_a_running_request_id_cannot_be_added_again() -> None:
    subject = scheduler()
    subject.add(request("a"))
    with pytest.raises(ValueError, match="already in the engine"):
        subject.add(request("a"))
    step(subject)
    with pytest.raises(ValueError, match="already in the engine"):
        subject.add(request("a"))


def test_an_id_is_free_again_after_the_end() -> None:
    subject = scheduler()
    subject.add(request("a", max_tokens=1))
    run_until_end(subject)
    assert subject.add(request("a")) is None


@pytest.mark.parametrize(
    ("prompt", "sampling", "name"),
    [
        ((VOCAB_SIZE,), {}, "prompt"),
        ((0, -1), {}, "prompt"),
        ((0,), {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
        ((0,), {"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ((0,), {"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_would_break_a_step_for_everybody_ends_alone(
    prompt: tuple[int, ...], sampling: dict[str, object], name: str
) -> None:
    event = scheduler().add(request("a", *prompt, **sampling))
    assert event is not None
    assert event.error is not None
    assert event.error.code == "internal_error"
    assert name in event.error.message


def test_an_empty_prompt_ends_alone() -> None:
    from dataclasses import replace

    event = scheduler().add(replace(request("a"), prompt_token_ids=()))
    assert event is not None
    assert event.error is not None
    assert "no tokens" in event.error.message


def test_defaults_of_sampling_params_mean_nothing_is_changed() -> None:
    assert SamplingParams().max_tokens is None
    assert SamplingParams(temperature=0, seed=0, max_tokens=1).temperature == 0
