"""Requests that are suspended at any moment and gone on with later, by the server itself or by a client."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dijiang_model.serving.network import FrozenModel
from server.engine.state.snapshot_files import read_snapshot
from server.engine.types.requests import FinishReason, GenerationRequest
from server.engine.types.state import Resumption, StateOptions
from tests.server.engine.state.snapshot_bench import PROMPT, Bench, Result, ask
from tests.tiny_models import tiny_network

FILE = "suspended.safetensors"
NOTE = json.dumps({"turn": "open"})
SAMPLED = {"temperature": 1.0, "seed": 11}
PENALISED = {**SAMPLED, "frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.3}
FUSSY = {"min_tokens": 9, "ignore_eos": False, "bad_words": ((65, 66), (70,))}
WAYS = pytest.mark.parametrize(
    "sampling", [{}, SAMPLED, PENALISED, FUSSY], ids=["greedy", "seeded", "penalised", "bounded"]
)


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return tiny_network()


def bench_of(model: FrozenModel, tmp_path: Path, num_ahead: int) -> Bench:
    return Bench(model, tmp_path, num_ahead=num_ahead)


def suspended(bench: Bench, request: GenerationRequest, num_steps: int, *, in_prompt: bool = True) -> Result:
    """What a request got that was suspended after so many steps, among others."""
    company = ask("company", 9, 8, 7, max_tokens=40)
    results = {"company": Result(), request.request_id: Result()}
    for item in (request, company):
        assert bench.engine.add(item) is None
    for _ in range(num_steps):
        for event in bench.engine.step():
            results[event.request_id].take(event)
    for event in bench.engine.suspend(request.request_id, save_to=FILE, note=NOTE, in_prompt=in_prompt):
        results[event.request_id].take(event)
    while bench.engine.has_work:
        for event in bench.engine.step():
            results[event.request_id].take(event)
    assert len(results["company"].tokens) == 40
    return results[request.request_id]


def going_on(request: GenerationRequest, before: Result) -> GenerationRequest:
    """What the server asks for after its restart."""
    prompt = (*request.prompt_token_ids, *before.tokens)
    num_fed = 0 if before.saved is None else before.saved.position
    states = StateOptions(load_from=None if before.saved is None else FILE)
    return replace(request, prompt_token_ids=prompt, states=states, resumed=Resumption(len(before.tokens), num_fed))


@WAYS
@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 2, 4, 5, 9, 14])
def test_the_server_goes_on_with_what_it_suspended_as_if_undisturbed(
    model: FrozenModel, tmp_path: Path, num_steps: int, num_ahead: int, sampling: dict[str, object]
) -> None:
    request = ask("one", *PROMPT, **{"max_tokens": 20, **sampling})
    undisturbed = bench_of(model, tmp_path, num_ahead).run(request)["one"]
    before = suspended(bench_of(model, tmp_path, num_ahead), request, num_steps)
    assert before.reason is FinishReason.SUSPENDED
    assert (before.saved is None) == (num_steps == 0)  # nothing was computed yet
    after = bench_of(model, tmp_path, num_ahead).run(going_on(request, before))["one"]
    assert before.tokens + after.tokens == undisturbed.tokens
    assert after.reason == undisturbed.reason


def test_without_a_file_it_goes_on_too_and_reads_the_tokens_again(model: FrozenModel, tmp_path: Path) -> None:
    request = ask("one", *PROMPT, max_tokens=20, **PENALISED)
    undisturbed = bench_of(model, tmp_path, 0).run(request)["one"]
    before = replace(suspended(bench_of(model, tmp_path, 0), request, 9), saved=None)
    after = bench_of(model, tmp_path, 0).run(going_on(request, before))["one"]
    assert before.tokens + after.tokens == undisturbed.tokens


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("num_ahead", [0, 1])
def test_a_client_goes_on_from_the_state_and_gets_the_tokens_that_were_missing(
    model: FrozenModel, tmp_path: Path, num_ahead: int, sampling: dict[str, object]
) -> None:
    request = ask("one", *PROMPT, **{"max_tokens": 20, **sampling})
    undisturbed = bench_of(model, tmp_path, num_ahead).run(request)["one"]
    before = suspended(bench_of(model, tmp_path, num_ahead), request, 9, in_prompt=False)
    num_left = 20 - len(before.tokens)
    assert 0 < num_left < 20
    again = ask("again", states=StateOptions(load_from=FILE), **{"max_tokens": num_left, **sampling})
    after = bench_of(model, tmp_path, num_ahead).run(again)["again"]
    assert (before.tokens + after.tokens, after.reason) == (undisturbed.tokens, FinishReason.LENGTH)


def test_it_may_be_suspended_again_and_again(model: FrozenModel, tmp_path: Path) -> None:
    request = ask("one", *PROMPT, max_tokens=20, **PENALISED)
    undisturbed = bench_of(model, tmp_path, 0).run(request)["one"]
    so_far = suspended(bench_of(model, tmp_path, 0), request, 6)
    for _ in range(3):
        more = suspended(bench_of(model, tmp_path, 0), going_on(request, so_far), 4)
        so_far = replace(more, tokens=so_far.tokens + more.tokens)
    after = bench_of(model, tmp_path, 0).run(going_on(request, so_far))["one"]
    assert so_far.tokens + after.tokens == undisturbed.tokens
    assert 0 < len(so_far.tokens) < 20


def test_a_prompt_that_is_still_read_is_saved_only_if_that_is_asked_for(model: FrozenModel, tmp_path: Path) -> None:
    request = ask("one", *PROMPT)
    result = suspended(bench_of(model, tmp_path, 0), request, 2, in_prompt=False)
    assert (result.reason, result.saved) == (FinishReason.SUSPENDED, None)
    assert not (tmp_path / FILE).exists()
    bench = bench_of(model, tmp_path, 0)
    result = suspended(bench, request, 2)
    assert result.saved is not None
    assert result.saved.position < len(PROMPT)
    assert read_snapshot(tmp_path / FILE, bench.layout).last_token == PROMPT[result.saved.position - 1]


def test_a_request_that_was_just_ending_ends_as_it_would_have(model: FrozenModel, tmp_path: Path) -> None:
    bench = bench_of(model, tmp_path, 0)
    request = ask("one", *PROMPT, states=StateOptions(save_to="own.safetensors"))
    assert bench.engine.add(request) is None
    result = Result()
    while not bench.snapshots.is_busy:
        for event in bench.engine.step():
            result.take(event)
    assert bench.engine.suspend("one", save_to=FILE, note=NOTE, in_prompt=True) == []
    while bench.engine.has_work:
        for event in bench.engine.step():
            result.take(event)
    assert result.reason is FinishReason.LENGTH
    assert result.saved is not None
    assert result.saved.file == "own.safetensors"
    assert bench.engine.suspend("one", save_to=FILE, note=NOTE, in_prompt=True) == []


def test_a_suspended_request_that_waits_for_a_file_or_a_slot_ends_without_one(
    model: FrozenModel, tmp_path: Path
) -> None:
    bench = bench_of(model, tmp_path, 0)
    bench.one(*PROMPT, states=StateOptions(save_to="base.safetensors"))
    reading = ask("reading", 5, states=StateOptions(load_from="base.safetensors"))
    waiting = [ask(f"{number}", *PROMPT) for number in range(6)]
    for request in (reading, *waiting):
        assert bench.engine.add(request) is None
    for name in ("reading", "5"):
        (event,) = bench.engine.suspend(name, save_to=FILE, note=NOTE, in_prompt=True)
        assert (event.request_id, event.finish_reason, event.saved) == (name, FinishReason.SUSPENDED, None)
    results = {f"{number}": Result() for number in range(5)}
    while bench.engine.has_work:
        for event in bench.engine.step():
            results[event.request_id].take(event)
    assert {len(result.tokens) for result in results.values()} == {12}


def test_the_slot_of_a_suspended_request_is_clear(model: FrozenModel, tmp_path: Path) -> None:
    bench = bench_of(model, tmp_path, 0)
    suspended(bench, ask("one", *PROMPT), 8)
    assert bench.engine.stats.num_free_slots == 4
    assert not any(tensor.any() for slot in range(1, 5) for tensor in (bench.pool.take(slot),))


def test_a_disk_that_takes_nothing_ends_a_suspended_request_without_a_state(model: FrozenModel, tmp_path: Path) -> None:
    bench = bench_of(model, tmp_path / "gone", 0)
    result = suspended(bench, ask("one", *PROMPT, max_tokens=20), 9)
    assert (result.reason, result.error, result.saved) == (FinishReason.SUSPENDED, None, None)
    assert 0 < len(result.tokens) < 20
