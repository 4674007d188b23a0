"""A real tiny model: who gives its slot up and gets another one later has the same tokens as undisturbed."""

from dataclasses import replace
from pathlib import Path

import pytest

from dijiang_model.model import DiJiangForCausalLM
from server.engine.fairness import shares
from server.engine.types.requests import FinishReason, GenerationRequest, Tenant
from server.engine.types.state import StateOptions
from tests.server.engine.some_requests import mixed_requests
from tests.server.engine.state.snapshot_bench import Bench as SnapshotBench
from tests.server.engine.state.snapshot_bench import Result, ask
from tests.server.engine.test_engine_model import Bench, alone
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> DiJiangForCausalLM:
    return tiny_model()


def of_tenants(requests: list[GenerationRequest], num: int) -> list[GenerationRequest]:
    return [replace(one, tenant=Tenant(f"t{number % num}")) for number, one in enumerate(requests)]


@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize("max_step_tokens", [4, 32])
def test_sequences_that_take_turns_have_the_tokens_that_they_have_alone(
    model: DiJiangForCausalLM, monkeypatch: pytest.MonkeyPatch, num_ahead: int, max_step_tokens: int
) -> None:
    monkeypatch.setattr(shares, "QUANTUM", 3)
    requests = of_tenants(mixed_requests(12), 5)
    bench = Bench(model, num_slots=3, max_step_tokens=max_step_tokens, num_ahead=num_ahead)
    bench.poison(range(4))
    together = bench.run(requests)
    assert bench.engine.stats.num_preemptions > 5
    assert together == {request.request_id: alone(model, request) for request in requests}


def test_a_sequence_without_a_slot_can_be_suspended_and_aborted_and_leaves_nothing(
    model: DiJiangForCausalLM, tmp_path: Path
) -> None:
    bench = SnapshotBench(model, tmp_path)
    results = {f"a{number}": Result() for number in range(4)} | {"b0": Result(), "b1": Result()}

    def take_steps(num: int) -> None:
        for _ in range(num):
            for event in bench.engine.step():
                results[event.request_id].take(event)

    for name in ("a0", "a1", "a2", "a3"):
        bench.engine.add(replace(ask(name, 3, 4, 5, max_tokens=400), tenant=Tenant("a")))
    take_steps(6)
    for name in ("b0", "b1"):
        bench.engine.add(replace(ask(name, 6, 7, max_tokens=400), tenant=Tenant("b")))
    take_steps(4)
    assert bench.engine.stats.num_waiting == 2, "two of a's four wait again"
    for event in bench.engine.suspend("a3", save_to="a3.safetensors", note="{}", in_prompt=False):
        results[event.request_id].take(event)
    ended = bench.engine.abort("a2")
    assert ended is not None
    results["a2"].take(ended)
    assert ended.finish_reason is FinishReason.ABORT
    while results["a3"].reason is None:
        take_steps(1)
    saved = results["a3"].saved
    assert saved is not None
    assert saved.position == 3 + len(results["a3"].tokens) - 1
    for name in ("a0", "a1", "b0", "b1"):
        bench.engine.abort(name)
    again = bench.one(states=StateOptions(load_from=saved.file), max_tokens=5)
    undisturbed = SnapshotBench(model, tmp_path).one(3, 4, 5, max_tokens=len(results["a3"].tokens) + 5)
    assert results["a3"].tokens + again.tokens == undisturbed.tokens
    assert bench.engine.stats.num_free_slots == 4
