"""Drafts on real tiny models: tokens, log-probabilities and states are those of single steps, bit for bit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dijiang_model.config import ModelConfig
from dijiang_model.native.library import load_library
from dijiang_model.serving.network import FrozenModel, freeze
from server.engine.engine import Engine
from server.engine.grammars.grammar import HEADER, GrammarCompiler
from server.engine.grammars.queue import GrammarQueue
from server.engine.loading import build_engine
from server.engine.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.speculation.drafts import OwnTextDrafter
from server.engine.speculation.rules import Speculation, speculation_of
from server.engine.state.pool import StatePool
from server.engine.types.logprobs import LogprobOptions, LogprobRow
from server.engine.types.requests import EngineConfig, FinishReason, GenerationRequest, GrammarSpec, SamplingParams
from tests.byte_tokenizer import write_byte_tokenizer
from tests.server.engine.fakes import FREE, engine_info
from tests.tiny_models import (
    EOS_TOKEN_ID,
    anchored,
    gpt_neox_config,
    llama_config,
    opt_config,
    tiny_model,
    tiny_network,
)

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels were not built: no compiler at install")

CPU = torch.device("cpu")
VOCAB_SIZE = 260
MODELS: dict[str, ModelConfig] = {
    "hybrid llama": llama_config(),
    "anchors": llama_config(anchored(2), anchored(2)),
    "released gpt_neox": gpt_neox_config(),
    "opt": opt_config(),
}
NUMBERS = HEADER + 'start: "[" /[0-9]{1,3}/ ("," /[0-9]{1,3}/)* "]"'


class Prompted(Speculation):
    """Drafts of a known answer: as many right ones as the next number says, then a wrong one."""

    def __init__(self, answers: Mapping[str, list[int]], num_right: list[int], *, max_drafts: int = 6) -> None:
        super().__init__(max_drafts, FREE)
        self._answers = answers
        self._num_right = num_right
        self._number = 0

    def _guess(self, sequence: Sequence, drafter: OwnTextDrafter, most: int, *, num_rows: int) -> tuple[int, ...]:
        self._number += 1
        begin = sequence.num_outputs
        ahead = self._answers[sequence.request_id][begin : begin + most + 1]
        right = ahead[: self._num_right[self._number % len(self._num_right)]]
        wrong = [(ahead[len(right)] + 1) % 256] if len(right) < len(ahead) else []
        drafts = (*right, *wrong)[:most]
        return tuple(token for token in drafts if token not in sequence.end_token_ids)


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...]
    reason: FinishReason
    rows: tuple[LogprobRow, ...]
    state: Tensor


class KeepingRunner(ModelRunner):
    """Keeps the slot of each ended sequence before it is cleared."""

    def keep(self, pool: StatePool) -> dict[str, Tensor]:
        self.kept_pool = pool
        self.kept: dict[str, Tensor] = {}
        return self.kept

    def release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.kept[sequence.request_id] = self.kept_pool.snapshot(sequence.slot)
        super().release(sequence)


def run(
    model: FrozenModel,
    requests: Iterable[GenerationRequest],
    *,
    speculation: Speculation | None = None,
    num_slots: int = 4,
    grammars: GrammarQueue | None = None,
) -> tuple[dict[str, Answer], Engine]:
    """Answers by request, and the engine that gave them."""
    pool = StatePool(model.state_spec, num_slots)
    scheduler = Scheduler(
        num_slots=num_slots,
        max_step_tokens=32,
        max_waiting=100,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=model.config.eos_token_ids,
        speculation=speculation,
        on_admission=lambda sequence: None if grammars is None else grammars.begin(sequence),
    )
    sampler = Sampler(VOCAB_SIZE, model.config.eos_token_ids, CPU)
    runner = KeepingRunner(model, pool=pool, sampler=sampler, device=CPU, advance=model.advance)
    states = runner.keep(pool)
    engine = Engine(scheduler=scheduler, runner=runner, info=engine_info(), grammars=grammars)
    tokens: dict[str, list[int]] = {}
    rows: dict[str, list[LogprobRow]] = {}
    ends = {}
    for request in requests:
        assert engine.add(request) is None
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            rows.setdefault(event.request_id, []).extend([] if event.logprobs is None else event.logprobs.rows())
            if event.finish_reason is not None:
                ends[event.request_id] = event.finish_reason
    return {
        name: Answer(tuple(tokens[name]), reason, tuple(rows[name]), states[name]) for name, reason in ends.items()
    }, engine


def make_request(name: str, prompt: list[int], **sampling: object) -> GenerationRequest:
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(name, tuple(prompt), SamplingParams(**params))  # type: ignore[arg-type]


def assert_same(answers: dict[str, Answer], expected: dict[str, Answer]) -> None:
    assert answers.keys() == expected.keys()
    for name, answer in answers.items():
        plain = expected[name]
        assert (answer.tokens, answer.reason) == (plain.tokens, plain.reason)
        assert answer.rows == plain.rows, "log-probabilities, to the bit"
        assert torch.equal(answer.state, plain.state), "as if each token had been fed alone"


_models: dict[tuple[str, int], FrozenModel] = {}


def model_of(name: str, seed: int = 0) -> FrozenModel:
    if (name, seed) not in _models:
        _models[name, seed] = tiny_network(MODELS[name], seed=seed)
    return _models[name, seed]


PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=40) | st.builds(
    lambda part, count: part * count, st.lists(st.integers(0, 255), min_size=1, max_size=5), st.integers(2, 8)
)


@pytest.mark.parametrize("name", list(MODELS))
@settings(max_examples=12, deadline=None)
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=5), seed=st.integers(0, 3), max_drafts=st.integers(1, 8))
def test_greedy_answers_are_identical(name: str, prompts: list[list[int]], seed: int, max_drafts: int) -> None:
    model = model_of(name, seed)
    requests = [make_request(f"r{n}", prompt, max_tokens=5 + 9 * n) for n, prompt in enumerate(prompts)]
    expected, _ = run(model, requests)
    answers, engine = run(model, requests, speculation=Speculation(max_drafts, FREE))
    assert_same(answers, expected)
    assert engine.stats.num_decode_tokens == sum(len(answer.tokens) - 1 for answer in answers.values())


@pytest.mark.parametrize("name", ["hybrid llama", "anchors"])
@settings(max_examples=40, deadline=None)
@given(num_right=st.lists(st.integers(0, 6), min_size=1, max_size=12), num_requests=st.integers(1, 6))
def test_drafts_refused_at_any_place_change_nothing(name: str, num_right: list[int], num_requests: int) -> None:
    model = model_of(name)
    requests = [make_request(f"r{n}", [*range(3 * n + 1)], max_tokens=24) for n in range(num_requests)]
    expected, plain = run(model, requests)
    drafts = Prompted({name: [*answer.tokens] for name, answer in expected.items()}, num_right)
    answers, engine = run(model, requests, speculation=drafts)
    assert_same(answers, expected)
    assert engine.stats.num_drafted_tokens > 0
    if min(num_right) > 0:
        assert engine.stats.num_steps < plain.stats.num_steps


SHAPED: dict[str, dict[str, object]] = {
    "sampled": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 1.3, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "typical": {"temperature": 0.8, "seed": 7, "typical_p": 0.9},
    "biased": {"logit_bias": ((7, 3.0), (9, 5.0))},
    "allowed": {"allowed_token_ids": (65, 66, 67), "temperature": 1.0, "seed": 8},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "penalised draw": {"frequency_penalty": 1.5, "temperature": 1.0, "seed": 9},
    "no pairs": {"bad_words": ((70, 70), (12,), (1, 2, 3)), "logit_bias": ((70, 9.0),)},
    "late end": {"ignore_eos": False, "min_tokens": 9, "logit_bias": ((EOS_TOKEN_ID, 4.0),)},
    "stop token": {"stop_token_ids": tuple(range(0, 256, 5)), "temperature": 1.0, "seed": 3},
}


@pytest.mark.parametrize("num_right", [[0], [1], [2], [6], [0, 3, 1, 6]])
def test_whatever_shapes_sampling_stays_exact_in_company(num_right: list[int]) -> None:
    model = model_of("hybrid llama")
    requests = [make_request(name, [*range(20, 30)], max_tokens=30, **shape) for name, shape in SHAPED.items()]
    requests = [replace(item, logprobs=LogprobOptions(3, None, (5,))) for item in requests]
    expected, _ = run(model, requests)
    assert {len(answer.rows) for answer in expected.values()} - {30}, "some end early"
    answers_so_far = {name: [*answer.tokens] for name, answer in expected.items()}
    for num_slots in (1, 4):
        answers, engine = run(model, requests, speculation=Prompted(answers_so_far, num_right), num_slots=num_slots)
        assert_same(answers, expected)
        assert engine.stats.num_drafted_tokens > 0


def test_penalties_count_a_token_that_is_accepted_twice() -> None:
    model = model_of("hybrid llama")
    bias = ((40, 30.0), (41, 26.0), (42, 22.0))
    request = make_request("a", [1, 2], max_tokens=40, frequency_penalty=1.0, logit_bias=bias)
    expected, _ = run(model, [request])
    assert max(expected["a"].tokens.count(token) for token in (40, 41, 42)) > 3
    for count in (2, 3, 6):
        answers, engine = run(model, [request], speculation=Prompted({"a": [*expected["a"].tokens]}, [count]))
        assert_same(answers, expected)
        assert engine.stats.num_accepted_tokens > 10


@pytest.mark.parametrize("num_right", [[0], [1], [4], [0, 6, 2]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammars_permit_drafts_as_they_permit_tokens(tmp_path: Path, num_right: list[int], temperature: float) -> None:
    write_byte_tokenizer(tmp_path)
    model = model_of("hybrid llama")

    def grammars() -> GrammarQueue:
        return GrammarQueue(
            lambda: GrammarCompiler.load(tmp_path, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,))
        )

    requests = [
        replace(
            make_request(f"r{n}", [n, 5, 6], max_tokens=40, temperature=temperature, seed=n, ignore_eos=False),
            grammar=GrammarSpec(NUMBERS),
        )
        for n in range(3)
    ]
    expected, _ = run(model, requests, grammars=grammars())
    drafts = Prompted({name: [*answer.tokens] for name, answer in expected.items()}, num_right)
    answers, engine = run(model, requests, speculation=drafts, grammars=grammars())
    assert_same(answers, expected)
    assert all(answer.tokens[0] == ord("[") for answer in answers.values())
    if num_right != [0]:
        assert engine.stats.num_accepted_tokens > 0


def test_logits_that_become_nan_end_the_request_where_they_would_have() -> None:
    network = tiny_model()
    model, embedding = freeze(network), network.get_submodule("model.embed_tokens").weight
    request = make_request("a", [1, 2, 3], max_tokens=30)
    expected, _ = run(model, [request])
    bad = next(token for token in expected["a"].tokens[5:] if token not in (1, 2, 3))
    at = expected["a"].tokens.index(bad)
    assert isinstance(embedding, Tensor)
    with torch.no_grad():
        saved = embedding[bad].clone()
        embedding[bad] = float("nan")
    plain, _ = run(model, [request])
    guesses = Prompted({"a": [*expected["a"].tokens]}, [6, 3])
    speculated, _ = run(model, [request], speculation=guesses)
    with torch.no_grad():
        embedding[bad] = saved
    assert plain["a"].reason is FinishReason.ERROR
    assert plain["a"].tokens == speculated["a"].tokens
    assert len(plain["a"].tokens) <= at + 1


def engine_config(path: Path, **changes: object) -> EngineConfig:
    values: dict[str, object] = {
        "model_path": str(path),
        "device": "cpu",
        "weights_dtype": "float32",
        "num_threads": torch.get_num_threads(),
        "state_memory_bytes": 2**20,
        "max_num_slots": 4,
        "max_step_tokens": 64,
        "max_waiting": 8,
    }
    return EngineConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_drafts_are_made_by_default_where_they_can_be_verified(tmp_path: Path) -> None:
    assert build_engine(tiny_network(), engine_config(tmp_path)).info.max_drafts == 15
    assert build_engine(tiny_network(), engine_config(tmp_path, max_drafts=3)).info.max_drafts == 3
    assert build_engine(tiny_network(), engine_config(tmp_path, max_drafts=0)).info.max_drafts == 0
    assert build_engine(tiny_network(native=False), engine_config(tmp_path)).info.max_drafts == 0


def test_drafts_that_could_not_be_verified_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speculate is 3"):
        build_engine(tiny_network(native=False), engine_config(tmp_path, max_drafts=3))
    assert speculation_of(0, can_defer=False, is_quantized=False) is None


def test_repetition_takes_fewer_steps_than_tokens(tmp_path: Path) -> None:
    engine = build_engine(tiny_network(), engine_config(tmp_path))
    request = make_request("a", [5, 6, 7, 8] * 6, max_tokens=400, logit_bias=((9, 50.0),))
    assert engine.add(request) is None
    while engine.has_work:
        engine.step()
    assert engine.stats.num_decode_tokens == 399
    assert engine.stats.num_steps < 100
