"""Constrained and free sequences in one engine: each gets what it would get alone, and what its grammar permits."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dijiang_model.serving.network import FrozenModel
from server.engine.engine import Engine
from server.engine.grammars.grammar import HEADER, GrammarCompiler, GrammarError
from server.engine.grammars.queue import GrammarQueue
from server.engine.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.state.pool import StatePool
from server.engine.types.requests import FinishReason, GenerationRequest, GrammarSpec, SamplingParams, TokenEvent
from tests.byte_tokenizer import write_byte_tokenizer
from tests.server.engine.fakes import engine_info
from tests.tiny_models import EOS_TOKEN_ID, tiny_network

CPU = torch.device("cpu")
COLOURS = ("red", "green", "dark blue")
CHOICE = HEADER + "start: " + " | ".join(map(json.dumps, COLOURS))
DIGITS = HEADER + "start: /[0-9]+/"
SHAPE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["cat", "dog"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
OBJECT = HEADER + f"start: %json {json.dumps(SHAPE)}"


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return tiny_network()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], GrammarCompiler]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return lambda: GrammarCompiler.load(folder, vocab_size=260, eos_token_ids=(EOS_TOKEN_ID,))


class Bench:
    """An engine around a tiny model, and everything that it says."""

    def __init__(
        self, model: FrozenModel, load: Callable[[], GrammarCompiler], *, num_ahead: int = 0, num_slots: int = 8
    ) -> None:
        config = model.config
        self.grammars = GrammarQueue(load)
        self.scheduler = Scheduler(
            num_slots=num_slots,
            max_step_tokens=32,
            max_waiting=1_000,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            on_admission=self.grammars.begin,
        )
        sampler = Sampler(config.vocab_size, config.eos_token_ids, CPU)
        runner = ModelRunner(model, pool=StatePool(model.state_spec, num_slots), sampler=sampler, device=CPU)
        self.engine = Engine(
            scheduler=self.scheduler, runner=runner, info=engine_info(), num_ahead=num_ahead, grammars=self.grammars
        )

    def run(self, requests: Iterable[GenerationRequest]) -> dict[str, tuple[list[int], TokenEvent]]:
        """Tokens and terminal event of each request."""
        for request in requests:
            assert self.engine.add(request) is None
        outputs: dict[str, list[int]] = {}
        ends: dict[str, tuple[list[int], TokenEvent]] = {}
        while self.engine.has_work:
            for event in self.engine.step():
                outputs.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish_reason is not None:
                    assert event.request_id not in ends
                    ends[event.request_id] = (outputs[event.request_id], event)
        self.grammars.close()
        return ends


def make_request(name: str, grammar: str | None, **sampling: object) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 200, "temperature": 1.0, **sampling})  # type: ignore[arg-type]
    prompt = tuple(name.encode() * 3)
    return GenerationRequest(name, prompt, params, grammar=None if grammar is None else GrammarSpec(grammar))


def text_of(tokens: list[int]) -> str:
    assert tokens[-1] == EOS_TOKEN_ID
    return bytes(tokens[:-1]).decode()


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_many_grammars_in_one_batch_each_keep_to_their_own(
    model: FrozenModel, load: Callable[[], GrammarCompiler], num_ahead: int
) -> None:
    requests = []
    for number in range(8):
        requests.append(make_request(f"choice{number}", CHOICE, seed=number))
        requests.append(make_request(f"object{number}", OBJECT, seed=number))
        requests.append(make_request(f"free{number}", None, seed=number, max_tokens=20, ignore_eos=True))
    ends = Bench(model, load, num_ahead=num_ahead).run(requests)
    for number in range(8):
        assert text_of(ends[f"choice{number}"][0]) in COLOURS
        value = json.loads(text_of(ends[f"object{number}"][0]))
        assert list(value) == ["name", "kind", "sizes"]
        assert len(value["name"]) <= 4
        assert value["kind"] in ("cat", "dog")
        assert len(value["sizes"]) <= 2
        assert all(isinstance(size, int) and -5 <= size <= 99 for size in value["sizes"])
        assert len(ends[f"free{number}"][0]) == 20
    assert all(end.finish_reason is FinishReason.STOP for name, (_, end) in ends.items() if "free" not in name)


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_tokens_under_a_grammar_depend_on_no_neighbour_and_no_step_ahead(
    model: FrozenModel, load: Callable[[], GrammarCompiler], num_ahead: int
) -> None:
    requests = [
        make_request(f"r{number}", (OBJECT, CHOICE, None)[number % 3], seed=number, max_tokens=30)
        for number in range(6)
    ]
    together = Bench(model, load, num_ahead=num_ahead).run(requests)
    for request in requests:
        alone = Bench(model, load, num_slots=1).run([request])
        assert alone[request.request_id] == together[request.request_id]


def test_a_text_that_does_not_end_in_time_says_so(model: FrozenModel, load: Callable[[], GrammarCompiler]) -> None:
    tokens, end = Bench(model, load).run([make_request("r", DIGITS, max_tokens=5, min_tokens=5)])["r"]
    assert end.finish_reason is FinishReason.LENGTH
    assert bytes(tokens).isdigit()
    assert len(tokens) == 5


@pytest.mark.parametrize("sampling", [{"min_tokens": 100}, {"ignore_eos": True}, {"temperature": 0.0, "min_tokens": 9}])
def test_a_text_that_cannot_go_on_ends_whatever_else_is_asked_for(
    model: FrozenModel, load: Callable[[], GrammarCompiler], sampling: dict[str, object]
) -> None:
    tokens, end = Bench(model, load).run([make_request("r", CHOICE, **sampling)])["r"]
    assert text_of(tokens) in COLOURS
    assert end.finish_reason is FinishReason.STOP


def test_a_text_that_can_go_on_does_so_until_min_tokens(
    model: FrozenModel, load: Callable[[], GrammarCompiler]
) -> None:
    ends = Bench(model, load).run(
        [
            make_request("least", DIGITS, min_tokens=40, logit_bias=((EOS_TOKEN_ID, 100.0),)),
            make_request("endless", DIGITS, ignore_eos=True, max_tokens=50, logit_bias=((EOS_TOKEN_ID, 100.0),)),
        ]
    )
    assert len(text_of(ends["least"][0])) == 40
    assert bytes(ends["endless"][0]).isdigit()
    assert ends["endless"][1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_bias_and_no_penalty_leads_out_of_the_grammar(
    model: FrozenModel, load: Callable[[], GrammarCompiler], temperature: float
) -> None:
    bias = ((ord("x"), 100.0), (ord("r"), -100.0), (ord("g"), -100.0))
    request = make_request(
        "r", CHOICE, temperature=temperature, logit_bias=bias, repetition_penalty=2.0, presence_penalty=2.0
    )
    tokens, _ = Bench(model, load).run([request])["r"]
    assert text_of(tokens) == "dark blue"


def test_a_stop_token_ends_a_constrained_text(model: FrozenModel, load: Callable[[], GrammarCompiler]) -> None:
    request = make_request("r", HEADER + 'start: "ab" "c"', stop_token_ids=(ord("b"),))
    tokens, end = Bench(model, load).run([request])["r"]
    assert bytes(tokens) == b"ab"
    assert end.finish_reason is FinishReason.STOP


def test_a_grammar_that_cannot_be_used_ends_its_request_alone(
    model: FrozenModel, load: Callable[[], GrammarCompiler]
) -> None:
    ends = Bench(model, load).run([make_request("bad", HEADER + "start: missing"), make_request("good", CHOICE)])
    error = ends["bad"][1].error
    assert error is not None
    assert error.code == "grammar_invalid"
    assert text_of(ends["good"][0]) in COLOURS


def test_a_sequence_that_leaves_its_grammar_ends_alone_with_an_error(
    model: FrozenModel, load: Callable[[], GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a grammar becomes too complex on the way: nothing is masked, and any token comes."""
    monkeypatch.setattr("server.engine.grammars.grammar.GrammarConstraint.write_mask", lambda *_, **__: None)
    ends = Bench(model, load).run([make_request("bad", CHOICE), make_request("good", None, max_tokens=5)])
    error = ends["bad"][1].error
    assert error is not None
    assert error.code == "grammar_failed"
    assert ends["good"][1].finish_reason is FinishReason.LENGTH


def test_a_request_can_leave_while_its_grammar_is_compiled(
    model: FrozenModel, load: Callable[[], GrammarCompiler]
) -> None:
    bench = Bench(model, load)
    assert bench.engine.add(make_request("r", CHOICE)) is None
    with pytest.raises(ValueError, match="already in the engine"):
        bench.engine.add(make_request("r", CHOICE))
    event = bench.engine.abort("r")
    assert event is not None
    assert event.finish_reason is FinishReason.ABORT
    assert not bench.engine.has_work
    assert bench.engine.abort("r") is None
    bench.grammars.close()


def test_free_requests_run_while_a_grammar_is_compiled(model: FrozenModel, load: Callable[[], GrammarCompiler]) -> None:
    is_open = False

    def load_later() -> GrammarCompiler:
        while not is_open:
            time.sleep(0.001)
        return load()

    bench = Bench(model, load_later)
    assert bench.engine.add(make_request("bound", CHOICE)) is None
    assert bench.engine.add(make_request("free", None, max_tokens=5)) is None
    seen = []
    while not (seen and seen[-1].finish_reason is not None):
        seen += bench.engine.step()
    assert {event.request_id for event in seen} == {"free"}
    is_open = True
    assert text_of(bench.run([])["bound"][0]) in COLOURS


def test_a_grammar_that_others_pushed_out_is_compiled_again(
    model: FrozenModel, load: Callable[[], GrammarCompiler]
) -> None:
    bench = Bench(model, load, num_slots=1)
    bench.grammars._max_cached = 1
    ends = bench.run([make_request(f"r{number}", (CHOICE, DIGITS)[number % 2], max_tokens=4) for number in range(4)])
    assert all(end.error is None for _, end in ends.values())


def test_a_model_without_tokenizer_refuses_grammars_and_serves_the_rest(model: FrozenModel) -> None:
    def load_nothing() -> GrammarCompiler:
        raise GrammarError("this model has no tokenizer")

    ends = Bench(model, load_nothing).run([make_request("r", CHOICE), make_request("free", None, max_tokens=3)])
    error = ends["r"][1].error
    assert error is not None
    assert error.code == "grammar_invalid"
    assert ends["free"][1].finish_reason is FinishReason.LENGTH


def test_an_engine_without_grammars_refuses_them(model: FrozenModel) -> None:
    scheduler = Scheduler(num_slots=1, max_step_tokens=8, max_waiting=1, vocab_size=260)
    runner = ModelRunner(
        model, pool=StatePool(model.state_spec, 1), sampler=Sampler(260, (EOS_TOKEN_ID,), CPU), device=CPU
    )
    engine = Engine(scheduler=scheduler, runner=runner, info=replace(engine_info(), vocab_size=260))
    event = engine.add(make_request("r", CHOICE))
    assert event is not None
    assert event.finish_reason is FinishReason.ERROR


def test_a_constrained_sequence_sits_out_steps_planned_ahead_and_a_free_one_does_not(
    load: Callable[[], GrammarCompiler],
) -> None:
    compiler = load()
    matcher = compiler.compile(DIGITS)

    def begin(sequence: Sequence) -> None:
        if sequence.request.grammar is not None:
            sequence.constraint = compiler.constraint(matcher)

    scheduler = Scheduler(num_slots=2, max_step_tokens=32, max_waiting=2, vocab_size=260, on_admission=begin)
    assert scheduler.add(make_request("bound", DIGITS)) is None
    assert scheduler.add(make_request("free", None)) is None
    planned = []
    for _ in range(4):
        first = scheduler.next_batch()
        ahead = scheduler.next_batch()
        assert first is not None
        assert ahead is not None
        planned += [[chunk.sequence.request_id for chunk in batch.sampled] for batch in (first, ahead)]
        for batch in (first, ahead):
            digits = [ord("7")] * len(batch.sampled)
            assert len(scheduler.commit(batch, digits, [False] * len(digits))) == len(digits)
    assert planned == [["bound", "free"], ["free"]] * 4
