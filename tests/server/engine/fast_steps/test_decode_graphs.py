"""Captured decode steps and sampling that waits for the step before: the same tokens as plain, synchronous steps.

On a CPU recording is running again (`eager`): buckets, padding, fixed memory and order are the same as on a GPU.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dijiang_model.serving.network import FrozenModel
from server.engine.engine import Engine
from server.engine.fast_steps import graph_sampling
from server.engine.fast_steps.graphs import DecodeGraphs, Work, eager, row_buckets
from server.engine.grammars.grammar import HEADER, GrammarCompiler
from server.engine.grammars.queue import GrammarQueue
from server.engine.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.state.pool import StatePool
from server.engine.types.requests import GenerationRequest, GrammarSpec, SamplingParams
from tests.byte_tokenizer import write_byte_tokenizer
from tests.server.engine.fakes import engine_info
from tests.server.engine.some_requests import make_request, mixed_requests
from tests.tiny_models import EOS_TOKEN_ID, tiny_network

CPU = torch.device("cpu")
NUM_SLOTS = 6


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return tiny_network()


@pytest.fixture(scope="module")
def load_grammars(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], GrammarCompiler]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return lambda: GrammarCompiler.load(folder, vocab_size=260, eos_token_ids=(EOS_TOKEN_ID,))


class CountingCapture:
    """Runs the work again, and counts replays by the order of recording."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, work: Work) -> Work:
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            work()

        return replay


class Bench:
    """An engine around a tiny model, with or without captured steps."""

    def __init__(
        self,
        model: FrozenModel,
        *,
        num_ahead: int,
        buckets: tuple[int, ...] = (),
        load: Callable[[], GrammarCompiler] | None = None,
    ) -> None:
        config = model.config
        self.pool, self.capture = StatePool(model.state_spec, NUM_SLOTS), CountingCapture()
        grammars = None if load is None else GrammarQueue(load)
        scheduler = Scheduler(
            num_slots=NUM_SLOTS,
            max_step_tokens=32,
            max_waiting=1_000,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            max_unseen=num_ahead,
            on_admission=(lambda sequence: None) if grammars is None else grammars.begin,
        )
        runner = ModelRunner(
            model,
            pool=self.pool,
            sampler=Sampler(config.vocab_size, config.eos_token_ids, CPU),
            device=CPU,
            record=(lambda last: self.record(model, last, buckets)) if buckets else None,
        )
        self.runner, self.grammars, self.scheduler = runner, grammars, scheduler
        self.engine = Engine(
            scheduler=scheduler, runner=runner, info=engine_info(), num_ahead=num_ahead, grammars=grammars
        )

    def record(self, model: FrozenModel, last_token_ids: Tensor, buckets: tuple[int, ...]) -> DecodeGraphs:
        graphs = DecodeGraphs(
            model, buffer=self.pool.buffer, last_token_ids=last_token_ids, buckets=buckets, capture=self.capture
        )
        graph_sampling.record(graphs, model.config.vocab_size)
        self.pool.buffer.storage[1:] = 0xFF  # what recording leaves in slots must not matter
        return graphs

    def run(self, requests: list[GenerationRequest]) -> tuple[dict[str, list[int]], dict[str, int]]:
        """Each request's tokens, and from its first to its last token the turns of the engine that gave it none."""
        outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        turn = 0
        for request in requests:
            assert self.engine.add(request) is None
        while self.engine.has_work:
            turn += 1
            for event in self.engine.step():
                assert event.error is None
                outputs[event.request_id].extend(event.token_ids)
                first.setdefault(event.request_id, turn)
                last[event.request_id] = turn
        if self.grammars is not None:
            self.grammars.close()
        return outputs, {name: last[name] - first[name] + 1 - len(outputs[name]) for name in outputs}


def test_every_number_of_rows_has_a_bucket_and_little_padding() -> None:
    assert row_buckets(10_000) == row_buckets(512)
    for most in (1, 3, 16, 100, 512):
        buckets = row_buckets(most)
        assert list(buckets) == sorted(set(buckets))
        assert (buckets[0], buckets[-1]) == (1, most)
        for num_rows in range(1, most + 1):
            bucket = next(bucket for bucket in buckets if bucket >= num_rows)
            assert bucket - num_rows <= bucket / 3 + 1


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_captured_steps_with_any_sampling_give_the_tokens_of_plain_ones(model: FrozenModel, num_ahead: int) -> None:
    requests = [*mixed_requests(12), make_request("plain", 5), make_request("drawn", 9, temperature=0.8, min_p=0.01)]
    expected, _ = Bench(model, num_ahead=0).run(requests)
    captured = Bench(model, num_ahead=num_ahead, buckets=(1, 2, 4, 6))
    outputs, _ = captured.run(requests)
    assert outputs == expected
    assert sum(captured.capture.replays[:4]) > 10


def test_a_step_that_fits_no_bucket_runs_freshly(model: FrozenModel) -> None:
    requests = [make_request(f"r{n}", 3 + n, seed=n) for n in range(6)]
    captured = Bench(model, num_ahead=1, buckets=(2,))
    assert captured.run(requests)[0] == Bench(model, num_ahead=0).run(requests)[0]


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [
        ({"temperature": 0.0, "top_p": 0.5, "typical_p": 0.5}, "greedy"),
        ({"temperature": 0.7, "min_p": 0.1}, "drawn"),
        ({"temperature": 0.7, "top_k": 40}, "filtered"),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 3}, "filtered"),
    ],
)
def test_rows_of_every_kind_are_sampled_within_the_recording(
    model: FrozenModel, sampling: dict[str, float], kind: graph_sampling.Kind
) -> None:
    requests = [make_request(f"r{n}", 4 + n, seed=n, **sampling) for n in range(3)]
    captured = Bench(model, num_ahead=1, buckets=(4,))
    assert captured.run(requests)[0] == Bench(model, num_ahead=0).run(requests)[0]
    forward, *samplings = captured.capture.replays
    assert samplings[[*graph_sampling.KINDS].index(kind)] == forward > 0


def test_poison_in_a_running_slot_is_a_fault_of_that_row_alone(model: FrozenModel) -> None:
    bench = Bench(model, num_ahead=1, buckets=(4,))
    requests = [make_request(name, 9, seed=seed, max_tokens=8) for seed, name in enumerate("abc")]
    for request in requests:
        bench.engine.add(request)
    events = [*bench.engine.step(), *bench.engine.step()]
    bench.pool.buffer.storage[2].view(torch.float32).fill_(float("nan"))
    while bench.engine.has_work:
        events += bench.engine.step()
    assert {event.request_id for event in events if event.error is not None} == {"b"}
    expected, _ = Bench(model, num_ahead=0).run([requests[0]])
    assert [token for event in events if event.request_id == "a" for token in event.token_ids] == expected["a"]


def constrained(name: str, seed: int) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=seed)
    return GenerationRequest(name, (1, 2, 3), sampling, grammar=GrammarSpec(HEADER + "start: /[0-9]{12}/"))


@pytest.mark.parametrize("buckets", [(), (1, 2, 4, 6)])
def test_grammars_sit_out_no_step_and_change_no_token(
    model: FrozenModel, load_grammars: Callable[[], GrammarCompiler], buckets: tuple[int, ...]
) -> None:
    """Twelve digits and the end; what may come is sampled only when the token before it was seen."""
    requests = [constrained("digits", 1), constrained("others", 2), make_request("free", 7, max_tokens=13)]
    words = make_request("words", 5, seed=3, max_tokens=13, bad_words=((7, 8), (9,)))
    expected, _ = Bench(model, num_ahead=0, load=load_grammars).run([*requests, words])
    ahead = Bench(model, num_ahead=1, buckets=buckets, load=load_grammars)
    outputs, num_idle = ahead.run([*requests, words])
    assert outputs == expected
    assert bytes(outputs["digits"][:12]).isdigit()
    assert num_idle == dict.fromkeys(outputs, 0)


def test_an_aborted_sequence_leaves_a_waiting_step_to_the_others(
    model: FrozenModel, load_grammars: Callable[[], GrammarCompiler]
) -> None:
    expected, _ = Bench(model, num_ahead=0, load=load_grammars).run([constrained("stays", 2)])
    bench = Bench(model, num_ahead=1, buckets=(4,), load=load_grammars)
    assert bench.grammars is not None
    for request in (constrained("goes", 1), constrained("stays", 2)):
        bench.engine.add(request)
    tokens: list[int] = []
    for number in range(200):
        if len(tokens) == 3:
            bench.engine.abort("goes")
        tokens += [token for event in bench.engine.step() if event.request_id == "stays" for token in event.token_ids]
        if number > 3 and not bench.engine.has_work:
            break
    bench.grammars.close()
    assert tokens == expected["stays"]
    assert bench.engine.stats.num_free_slots == NUM_SLOTS


def test_eager_capture_is_the_work_itself() -> None:
    done: list[int] = []
    eager(lambda: done.append(1))()
    assert done == [1]
