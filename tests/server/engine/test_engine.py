"""The synchronous engine around a fake runner: turns, statistics, clean-up."""

import pytest

from server.engine.engine import Engine
from server.engine.process.main import load_engine
from server.engine.types.requests import EngineConfig, FinishReason, TokenEvent
from tests.server.engine.fakes import EOS_TOKEN_ID, FakeRunner, engine, expected_output, request


def finish(subject: Engine) -> dict[str, list[int]]:
    """Runs everything to its end; the tokens of each request."""
    outputs: dict[str, list[int]] = {}
    while subject.has_work:
        for event in subject.step():
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
    return outputs


@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_launching_ahead_changes_no_token(num_ahead: int) -> None:
    subject = engine(FakeRunner(), num_ahead=num_ahead)
    prompts = {f"r{number}": tuple(range(1, 2 + 3 * number)) for number in range(6)}
    for name, prompt in prompts.items():
        assert subject.add(request(name, *prompt, max_tokens=4)) is None
    assert finish(subject) == {name: expected_output(prompt, 4) for name, prompt in prompts.items()}


def test_launching_ahead_runs_one_row_too_many_after_a_stop_and_reports_it_to_nobody() -> None:
    runner = FakeRunner()
    runner.scripted["a"] = [5, EOS_TOKEN_ID]
    subject = engine(runner, num_ahead=1)
    subject.add(request("a"))
    assert finish(subject) == {"a": [5, EOS_TOKEN_ID]}
    assert len(runner.batches) == 3
    assert [sequence.request_id for sequence in runner.released] == ["a"]


def test_a_slot_freed_by_a_step_ahead_is_clean_for_its_next_sequence() -> None:
    runner = FakeRunner()
    runner.scripted["a"] = [EOS_TOKEN_ID]
    subject = engine(runner, num_ahead=1, num_slots=1)
    subject.add(request("a"))
    subject.add(request("b", 4, 5, max_tokens=3))
    assert finish(subject)["b"] == expected_output((4, 5), 3)


def test_every_ended_sequence_is_released_once_and_waiting_ones_never_held_anything() -> None:
    runner = FakeRunner()
    subject = engine(runner)
    for name in ("done", "aborted", "waiting"):
        subject.add(request(name, max_tokens=2))
    subject.step()
    subject.abort("waiting")
    subject.abort("aborted")
    finish(subject)
    assert sorted(sequence.request_id for sequence in runner.released) == ["aborted", "done"]


def test_statistics_count_what_was_done() -> None:
    subject = engine(FakeRunner())
    subject.add(request("a", *range(10), max_tokens=3))
    finish(subject)
    stats = subject.stats
    assert (stats.num_steps, stats.num_prefill_tokens, stats.num_decode_tokens) == (4, 10, 2)
    assert (stats.num_running, stats.num_waiting, stats.num_free_slots) == (0, 0, 2)
    assert stats.step_time_s > 0


def test_a_step_without_work_does_nothing() -> None:
    subject = engine(FakeRunner())
    assert not subject.has_work
    assert subject.step() == []


def test_one_token_is_one_event_with_its_end() -> None:
    subject = engine(FakeRunner())
    subject.add(request("a", max_tokens=1))
    assert subject.step() == [TokenEvent("a", tuple(expected_output((1, 2, 3), 1)), FinishReason.LENGTH)]


def config(**changes: object) -> EngineConfig:
    values: dict[str, object] = {
        "model_path": "nowhere",
        "device": "cpu",
        "weights_dtype": "float32",
        "num_threads": 1,
        "state_memory_bytes": 2**20,
        "max_num_slots": 4,
        "max_step_tokens": 16,
        "max_waiting": 8,
    }
    return EngineConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_dtype": "int3"}, "weights_dtype is 'int3', and must be one of float32, bfloat16, float16"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but [0-9]+ CUDA devices are usable here"),
        ({"device": "meta"}, "device is 'meta', and must be cpu, cuda or cuda:N"),
    ],
)
def test_a_setting_that_cannot_take_effect_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_engine(config(**changes))
