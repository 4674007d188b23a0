"""The engine on real tiny models: what a request gets depends on nothing but the request."""

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dijiang_model.batch import PackedBatch, decode, prefill
from dijiang_model.config import ModelConfig
from dijiang_model.conversion.quantize import quantize_folder
from dijiang_model.quantization.config import WeightKind
from dijiang_model.serving.network import FrozenModel
from dijiang_model.state import StateBuffer
from server.engine.engine import Engine
from server.engine.loading import build_engine, load_engine
from server.engine.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.state.pool import StateBudgetError, StatePool
from server.engine.types.requests import EngineConfig, FinishReason, GenerationRequest, SamplingParams
from tests.server.engine.fakes import engine_info
from tests.server.engine.some_requests import make_request, mixed_requests
from tests.tiny_models import EOS_TOKEN_ID, gpt_neox_config, llama_config, tiny_network, write_tiny_model

CPU = torch.device("cpu")
MODELS = {"hybrid llama": llama_config(), "released gpt_neox": gpt_neox_config()}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> FrozenModel:
    return tiny_network(MODELS[request.param])


@pytest.fixture(scope="module")
def hybrid() -> FrozenModel:
    return tiny_network()


class Bench:
    """An engine whose pool can be looked at and poisoned."""

    def __init__(
        self, model: FrozenModel, *, num_slots: int = 4, max_step_tokens: int = 32, num_ahead: int = 0
    ) -> None:
        config: ModelConfig = model.config
        self.pool = StatePool(model.state_spec, num_slots)
        self.sampler = Sampler(config.vocab_size, config.eos_token_ids, CPU)
        scheduler = Scheduler(
            num_slots=num_slots,
            max_step_tokens=max_step_tokens,
            max_waiting=1_000,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
        )
        runner = ModelRunner(model, pool=self.pool, sampler=self.sampler, device=CPU)
        self.engine = Engine(scheduler=scheduler, runner=runner, info=engine_info(), num_ahead=num_ahead)

    def run(self, requests: Iterable[GenerationRequest]) -> dict[str, tuple[list[int], FinishReason]]:
        for request in requests:
            assert self.engine.add(request) is None
        return self.finish()

    def finish(self) -> dict[str, tuple[list[int], FinishReason]]:
        outputs: dict[str, list[int]] = {}
        ends = {}
        while self.engine.has_work:
            for event in self.engine.step():
                outputs.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish_reason is not None:
                    ends[event.request_id] = (outputs[event.request_id], event.finish_reason)
        return ends

    def poison(self, slots: Iterable[int]) -> None:
        """Fills slots with NaN; what is not fp32 in there becomes NaN's bit pattern too."""
        for slot in slots:
            self.pool.buffer.storage[slot].view(torch.float32).fill_(float("nan"))


def alone(model: FrozenModel, request: GenerationRequest) -> tuple[list[int], FinishReason]:
    return Bench(model, num_slots=1, max_step_tokens=256).run([request])[request.request_id]


@pytest.mark.parametrize("max_step_tokens", [4, 17, 512])
def test_tokens_depend_on_no_neighbour_no_slot_and_no_split_of_the_prompt(
    model: FrozenModel, max_step_tokens: int
) -> None:
    requests = mixed_requests(12)
    together = Bench(model, max_step_tokens=max_step_tokens).run(requests)
    assert together == {request.request_id: alone(model, request) for request in requests}


def test_launching_ahead_changes_no_token_of_a_real_model(model: FrozenModel) -> None:
    requests = mixed_requests(10)
    assert Bench(model, num_ahead=1).run(requests) == Bench(model).run(requests)


def test_64_concurrent_greedy_sequences_equal_those_alone(hybrid: FrozenModel) -> None:
    requests = [make_request(f"r{number}", 1 + number % 50, seed=number) for number in range(64)]
    together = Bench(hybrid, num_slots=64, max_step_tokens=200).run(requests)
    assert together == {request.request_id: alone(hybrid, request) for request in requests}


def test_greedy_tokens_are_those_of_the_bare_model(model: FrozenModel) -> None:
    request = make_request("a", 21, max_tokens=10)
    state = StateBuffer(model.state_spec, 2)
    state.storage.zero_()
    tokens = torch.tensor(request.prompt_token_ids)
    slots = torch.tensor([1])
    output: list[int] = []
    with torch.inference_mode():
        logits = prefill(model, tokens, lengths=[len(tokens)], slots=slots, starts=torch.tensor([0]), state=state)
        for position in range(len(tokens), len(tokens) + 10):
            output.append(int(logits[-1].argmax()))
            logits = decode(
                model, torch.tensor(output[-1:]), slots=slots, positions=torch.tensor([position]), state=state
            )
    assert Bench(model).run([request])["a"] == (output, FinishReason.LENGTH)


def test_poisoned_free_slots_and_reuse_leak_nothing(model: FrozenModel) -> None:
    requests = mixed_requests(6)
    expected = {request.request_id: alone(model, request) for request in requests}
    bench = Bench(model, num_slots=3)
    for _ in range(3):
        bench.poison(range(4))  # the scratch slot too
        assert bench.run(requests) == expected


def test_poison_in_a_running_slot_ends_that_request_alone(hybrid: FrozenModel) -> None:
    requests = [make_request(name, 9, seed=seed, max_tokens=6) for seed, name in enumerate("abc")]
    bench = Bench(hybrid)
    for request in requests:
        bench.engine.add(request)
    events = [bench.engine.step()]
    bench.poison([2])
    while bench.engine.has_work:
        events.append(bench.engine.step())
    ends = {event.request_id: event for step in events for event in step if event.finish_reason is not None}
    assert ends["b"].finish_reason is FinishReason.ERROR
    assert ends["b"].error is not None
    assert ends["b"].error.code == "numerical_error"
    for request in (requests[0], requests[2]):
        tokens = [
            token
            for step in events
            for event in step
            for token in event.token_ids
            if event.request_id == request.request_id
        ]
        assert tokens == alone(hybrid, request)[0]
    assert bench.run([requests[1]])["b"] == alone(hybrid, requests[1]), "the slot is clean again"


def test_a_slot_is_zero_after_its_request_whichever_way_it_ends(hybrid: FrozenModel) -> None:
    bench = Bench(hybrid)
    bench.run([make_request("finished", 12)])
    for name, num_steps in (("in prefill", 1), ("in decode", 4)):
        bench.engine.add(make_request(name, 40))
        for _ in range(num_steps):
            bench.engine.step()
        assert bench.pool.buffer.storage[1:].any()
        assert bench.engine.abort(name) is not None
        assert not bench.pool.buffer.storage[1:].any()
    assert bench.engine.stats.num_free_slots == 4
    assert not bench.engine.has_work


def test_200_aborts_leave_all_slots_free_and_the_next_answer_right(hybrid: FrozenModel) -> None:
    bench = Bench(hybrid, num_slots=8)
    for number in range(200):
        bench.engine.add(make_request(f"r{number}", 1 + number % 60, max_tokens=None))
    for _ in range(6):
        bench.engine.step()
    for number in range(200):
        assert bench.engine.abort(f"r{number}") is not None
    assert bench.engine.stats.num_free_slots == 8
    request = make_request("after", 30)
    assert bench.run([request])["after"] == alone(hybrid, request)


def test_an_answer_fed_back_as_a_prompt_goes_on_the_same_way(model: FrozenModel) -> None:
    request = make_request("a", 15, max_tokens=12)
    output = Bench(model).run([request])["a"][0]
    longer = GenerationRequest(
        "b", (*request.prompt_token_ids, *output[:7]), SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    )
    assert Bench(model, max_step_tokens=5).run([longer])["b"][0] == output[7:]


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(hybrid: FrozenModel) -> None:
    def output(seed: int) -> list[int]:
        request = GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=12, ignore_eos=True, seed=seed))
        return Bench(hybrid).run([request])["a"][0]

    assert output(0) == output(0)
    assert len({tuple(output(seed)) for seed in range(5)}) == 5


def test_min_tokens_and_eos_bias_work_together(hybrid: FrozenModel) -> None:
    sampling = SamplingParams(temperature=0, min_tokens=3, logit_bias=((EOS_TOKEN_ID, 100.0),), max_tokens=9)
    output, reason = Bench(hybrid).run([GenerationRequest("a", (1, 2), sampling)])["a"]
    assert (len(output), output[-1], reason) == (4, EOS_TOKEN_ID, FinishReason.STOP)
    assert EOS_TOKEN_ID not in output[:-1]


def test_generation_runs_past_every_table_of_positions(model: FrozenModel) -> None:
    """128 and 64 positions were trained; the sequence goes three times as far."""
    request = make_request("a", 5, max_tokens=400)
    output, reason = Bench(model).run([request])["a"]
    assert (len(output), reason) == (400, FinishReason.LENGTH)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    max_step_tokens=st.integers(3, 40),
    abort=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10)), max_size=3),
)
def test_any_mixture_with_aborts_leaves_the_others_as_they_are_alone(
    lengths: list[int], max_step_tokens: int, abort: list[tuple[int, int]]
) -> None:
    model = tiny_network()
    requests = [make_request(f"r{number}", length, max_tokens=6) for number, length in enumerate(lengths)]
    bench = Bench(model, num_slots=3, max_step_tokens=max_step_tokens)
    for request in requests:
        bench.engine.add(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for number in range(200):
        for victim, at_step in abort:
            if at_step == number:
                bench.engine.abort(f"r{victim}")
        for event in bench.engine.step():
            outputs[event.request_id].extend(event.token_ids)
    assert not bench.engine.has_work
    aborted = {f"r{victim}" for victim, _ in abort}
    for request in requests:
        expected = alone(model, request)[0]
        output = outputs[request.request_id]
        assert output == (expected[: len(output)] if request.request_id in aborted else expected)


def test_the_step_is_one_packed_batch_without_padding(hybrid: FrozenModel) -> None:
    batches: list[PackedBatch] = []

    def spy(batch: PackedBatch, state: StateBuffer) -> torch.Tensor:
        batches.append(batch)
        return hybrid(batch, state)

    pool = StatePool(hybrid.state_spec, 3)
    scheduler = Scheduler(num_slots=3, max_step_tokens=10, max_waiting=9, vocab_size=260)
    runner = ModelRunner(spy, pool=pool, sampler=Sampler(260, (), CPU), device=CPU)
    engine = Engine(scheduler=scheduler, runner=runner, info=engine_info())
    engine.add(make_request("a", 4))
    engine.step()
    engine.add(make_request("b", 12))
    engine.step()
    last = batches[-1]
    assert (last.lengths, last.num_decode, last.slots.tolist()) == ((1, 9), 1, [1, 2])
    assert last.positions.tolist() == [4, *range(9)]
    assert last.logit_rows.tolist() == [0], "a prompt that goes on samples nothing"
    engine.step()
    assert batches[-1].logit_rows.tolist() == [0, 3]


def engine_config(path: Path, **changes: object) -> EngineConfig:
    values: dict[str, object] = {
        "model_path": str(path),
        "device": "cpu",
        "weights_dtype": "float32",
        "num_threads": torch.get_num_threads(),
        "state_memory_bytes": 2**20,
        "max_num_slots": 512,
        "max_step_tokens": 64,
        "max_waiting": 8,
    }
    return EngineConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_load_builds_an_engine_from_a_folder(tmp_path: Path, hybrid: FrozenModel) -> None:
    engine = load_engine(engine_config(write_tiny_model(tmp_path / "model", with_tokenizer=False)))
    info = engine.info
    assert info.state_bytes_per_slot == hybrid.state_spec.bytes_per_slot
    assert info.num_slots == min(2**20 // info.state_bytes_per_slot - 1, 64)
    assert info.num_parameters == hybrid.num_parameters
    assert (info.vocab_size, info.eos_token_ids, info.load_s > 0) == (260, (EOS_TOKEN_ID,), True)
    request = make_request("a", 11)
    engine.add(request)
    output: list[int] = []
    while engine.has_work:
        output += [token for event in engine.step() for token in event.token_ids]
    assert output == alone(hybrid, request)[0]


def test_there_are_no_more_slots_than_step_tokens(hybrid: FrozenModel) -> None:
    assert build_engine(hybrid, engine_config(Path("unused"), max_step_tokens=7)).info.num_slots == 7


def test_too_little_state_memory_is_refused_in_numbers(hybrid: FrozenModel) -> None:
    with pytest.raises(StateBudgetError, match="1,000 bytes of state memory"):
        build_engine(hybrid, engine_config(Path("unused"), state_memory_bytes=1_000))


@pytest.mark.parametrize("kind", get_args(WeightKind))
def test_rounded_weights_answer_and_are_told(tmp_path: Path, kind: WeightKind) -> None:
    folder, small = write_tiny_model(tmp_path / "model", with_tokenizer=False), tmp_path / "small"
    quantize_folder(folder, small, kind=kind)
    stored, rounded = (load_engine(engine_config(folder, weights_dtype=dtype)) for dtype in ("float32", kind))
    saved = load_engine(engine_config(small, weights_dtype="float32"))
    assert rounded.info.num_parameters == saved.info.num_parameters == stored.info.num_parameters
    assert rounded.info.weights_dtype == saved.info.weights_dtype == kind
    # A state of one would go on differently in the other; saved, the weights are other files.
    layouts = {str(engine.info.state_layout) for engine in (stored, rounded, saved)}
    assert len(layouts) == 3
    answers = []
    for engine in (rounded, saved):
        assert engine.add(GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=4, temperature=0))) is None
        tokens = []
        while engine.has_work:
            tokens += [token for event in engine.step() for token in event.token_ids]
        assert len(tokens) == 4
        answers.append(tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", {"BF16", "F32"}), ("int8", {"I8", "BF16", "F32"})])
def test_narrow_states_halve_a_slot_and_are_told_apart(tmp_path: Path, dtype: str, kept: set[str]) -> None:
    folder = write_tiny_model(tmp_path / "model", with_tokenizer=False)
    wide, narrow = (load_engine(engine_config(folder, state_dtype=one)) for one in ("float32", dtype))
    assert narrow.info.state_dtype == dtype
    assert narrow.info.state_bytes_per_slot < 0.6 * wide.info.state_bytes_per_slot
    assert narrow.info.num_slots >= wide.info.num_slots
    assert narrow.info.state_layout is not None
    assert wide.info.state_layout is not None
    assert narrow.info.state_layout.fingerprint != wide.info.state_layout.fingerprint
    assert {tensor.dtype for tensor in narrow.info.state_layout.tensors} == kept
    assert narrow.add(GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=4, temperature=0))) is None
    tokens = []
    while narrow.has_work:
        tokens += [token for event in narrow.step() for token in event.token_ids]
    assert len(tokens) == 4


def test_other_states_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", with_tokenizer=False)
    with pytest.raises(ValueError, match="state_dtype is 'float16', and must be one of float32, bfloat16, int8"):
        load_engine(engine_config(folder, state_dtype="float16"))
