"""On a CUDA device the engine says what it says on the CPU, one step ahead of the host."""

from dataclasses import replace

import pytest
import torch

from dijiang_model.serving.network import freeze
from server.engine.fairness import shares
from server.engine.loading import build_engine
from server.engine.types.logprobs import LogprobOptions
from server.engine.types.requests import EngineConfig, GenerationRequest, Tenant
from tests.server.engine.some_requests import make_request, mixed_requests
from tests.tiny_models import gpt_neox_config, llama_config, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def answers(
    device: str, requests: list[GenerationRequest], *, family: str, decode_graphs: bool = True
) -> dict[str, list[int]]:
    model = tiny_model({"llama": llama_config(), "gpt_neox": gpt_neox_config()}[family]).to(device)
    engine = build_engine(
        freeze(model),
        EngineConfig(
            model_path="in memory",
            device=device,
            weights_dtype="float32",
            num_threads=1,
            state_memory_bytes=2**22,
            max_num_slots=5,
            max_step_tokens=24,
            max_waiting=100,
            decode_graphs=decode_graphs,
        ),
    )
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert engine.add(request) is None
    while engine.has_work:
        for event in engine.step():
            outputs[event.request_id].extend(event.token_ids)
    assert engine.stats.num_free_slots == 5
    return outputs


@pytest.mark.parametrize("decode_graphs", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_every_kind_of_request_gets_the_tokens_it_gets_on_the_cpu(family: str, decode_graphs: bool) -> None:
    requests = [*mixed_requests(16), make_request("drawn", 9, temperature=0.8), make_request("greedy", 7)]
    expected = answers("cpu", requests, family=family)
    assert answers("cuda", requests, family=family, decode_graphs=decode_graphs) == expected


def test_sequences_that_take_turns_in_the_slots_have_the_tokens_that_they_have_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shares, "QUANTUM", 3)
    requests = [replace(one, tenant=Tenant(f"t{number % 7}")) for number, one in enumerate(mixed_requests(14))]
    assert answers("cuda", requests, family="llama") == answers("cpu", requests, family="llama")


def test_bad_words_that_depend_on_the_last_token_change_nothing_else() -> None:
    """Such rows are sampled when the step before them was read back, beside rows that do not wait."""
    requests = [make_request(f"r{n}", 5 + n, seed=n, temperature=1.0, bad_words=((7, 8), (9,))) for n in range(3)]
    requests.append(make_request("free", 6))
    assert answers("cuda", requests, family="llama") == answers("cpu", requests, family="llama")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_log_probabilities_and_shared_prefills_change_no_token(family: str) -> None:
    requests = [
        replace(request, logprobs=LogprobOptions(num_output=3, num_prompt=2, token_ids=(7,)))
        for request in mixed_requests(8)
    ]
    prompt = requests[-1].prompt_token_ids
    requests += [
        replace(request, request_id=f"g{number}", prompt_token_ids=prompt, group="g")
        for number, request in enumerate(mixed_requests(6))
    ]
    assert answers("cuda", requests, family=family) == answers("cpu", requests, family=family)
