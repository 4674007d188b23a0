"""States that are no numbers end their own request, in torch and in the compiled kernels; their sizes are told."""

import math

import pytest
import torch

from dijiang_model.native.library import load_library
from dijiang_model.ops.torch.rounding import round_rows, widened_rows
from dijiang_model.state import StateBuffer, StateSpec, StateTensor
from server.engine.engine import Engine
from server.engine.loading import Network, assemble_engine
from server.engine.state.norm import StateNorm
from server.engine.state.pool import StatePool
from server.engine.state.watch import StateWatch
from server.engine.types.position_stats import NORM_BUCKETS, NOTHING_OBSERVED
from server.engine.types.requests import EngineConfig, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tests.server.engine.fakes import FakeRunner, engine, engine_info, expected_output, request, scheduler
from tests.tiny_models import tiny_model, tiny_network

PATHS = [
    pytest.param(
        True, id="native", marks=pytest.mark.skipif(load_library() is None, reason="the kernels were not built")
    ),
    pytest.param(False, id="torch"),
]
CONFIG = EngineConfig("nowhere", "cpu", "float32", 1, 1 << 20, 4, 64, 8, max_drafts=0)


class ScriptedProbe:
    """Says what it is told; remembers the slots that it was asked for."""

    def __init__(self, *norms: float) -> None:
        self.slots: list[int] = []
        self._norms = list(norms)

    def launch(self, slot: int) -> None:
        self.slots.append(slot)

    def collect(self) -> float:
        return self._norms.pop(0) if self._norms else 1.0


def watched(probe: ScriptedProbe, *, interval_s: float = 0.0) -> Engine:
    watch = StateWatch(probe, interval_s=interval_s)
    return Engine(scheduler=scheduler(), runner=FakeRunner(), info=engine_info(), watch=watch)


def run(subject: Engine) -> list[TokenEvent]:
    events = []
    while subject.has_work:
        events += subject.step()
    return events


def test_every_running_conversation_gets_its_turn() -> None:
    probe = ScriptedProbe()
    subject = watched(probe)
    subject.add(request("a", max_tokens=6))
    subject.add(request("b", max_tokens=6))
    run(subject)
    assert probe.slots[:4] == [1, 2, 1, 2]


def test_a_state_that_is_not_finite_ends_its_request_alone_with_words() -> None:
    subject = watched(ScriptedProbe(1.0, math.nan, 1.0))
    subject.add(request("a", max_tokens=8))
    subject.add(request("b", 4, 5, max_tokens=8))
    events = run(subject)
    [end] = [event for event in events if event.request_id == "b" and event.finish_reason is not None]
    assert end.finish_reason is FinishReason.ERROR
    assert end.error is not None
    assert (end.error.code, "state" in end.error.message) == ("numerical_error", True)
    assert [token for event in events if event.request_id == "a" for token in event.token_ids] == expected_output(
        (1, 2, 3), 8
    )
    assert (subject.stats.num_not_finite, subject.stats.num_free_slots) == (1, 2)


def test_a_sequence_that_ended_before_its_measurement_was_read_harms_nobody() -> None:
    subject = watched(ScriptedProbe(math.inf))
    subject.add(request("a", max_tokens=2))
    run(subject)
    subject.add(request("b", max_tokens=4))
    assert run(subject)[-1].finish_reason is FinishReason.LENGTH
    assert subject.stats.num_not_finite == 0


def test_not_every_step_is_measured() -> None:
    probe = ScriptedProbe()
    subject = watched(probe, interval_s=3600.0)
    subject.add(request("a", max_tokens=20))
    run(subject)
    assert probe.slots == [1]


def test_times_of_tokens_are_counted_where_no_prompt_was_read() -> None:
    subject = engine(FakeRunner())
    subject.add(request("a", *range(1, 11), max_tokens=5))
    subject.add(request("b", max_tokens=5))
    run(subject)
    times = subject.stats.token_times
    assert times.positions == (0,)
    assert 0 < sum(times.counts[0]) <= 8  # of each answer the first token belongs to its prompt
    assert 0 < times.sums[0] <= 2 * subject.stats.step_time_s


def test_rows_in_int8_count_by_what_they_stand_for() -> None:
    model = tiny_model().keep_states_in(torch.int8)
    buffer = StateBuffer(model.state_spec, 3, cleared=True)
    generator = torch.Generator().manual_seed(1)
    squares = 0.0
    for name, tensor in buffer.tensors.items():
        if tensor.is_floating_point() and not name.endswith("_scales"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            squares += float(tensor[1].double().square().sum())
    for kind in ("key", "value"):
        codes, scales = buffer.tensors[f"layers.0.near_{kind}s"], buffer.tensors[f"layers.0.near_{kind}_scales"]
        rows = torch.randn(codes.shape, generator=generator) * 100
        codes[:], scales[:] = round_rows(rows)
        squares += float(widened_rows(codes[1], scales[1]).double().square().sum())
    probe = StateNorm(buffer)
    probe.launch(1)
    assert probe.collect() == pytest.approx(math.sqrt(squares), rel=1e-6)
    buffer.tensors["layers.0.near_key_scales"][2, 0, 0] = math.nan  # what a row that was not finite leaves
    probe.launch(2)
    assert math.isnan(probe.collect())


def test_the_norm_is_that_of_all_floating_point_numbers() -> None:
    spec = StateSpec(
        (
            StateTensor("sums", (3, 5), torch.float32),
            StateTensor("window", (7,), torch.bfloat16),
            StateTensor("codes", (9,), torch.int8),
        )
    )
    buffer = StateBuffer(spec, 3)
    generator = torch.Generator().manual_seed(1)
    for tensor in buffer.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1e20 if tensor.is_floating_point() else tensor)
    probe = StateNorm(buffer)
    probe.launch(1)
    values = [x for name in ("sums", "window") for x in buffer.tensors[name][1].double().flatten().tolist()]
    assert probe.collect() == pytest.approx(math.sqrt(sum(x * x for x in values)), rel=1e-12)
    for poison in (math.nan, math.inf):
        buffer.tensors["window"][2, 3] = poison
        probe.launch(2)
        assert not math.isfinite(probe.collect())
        probe.launch(1)
        assert math.isfinite(probe.collect())


def model_engine(*, native: bool) -> tuple[Engine, StatePool]:
    model = tiny_network(native=native)
    assert model.decode_path == ("native" if native else "torch")
    pool = StatePool(model.state_spec, 4)
    network = Network(model, pool, model.config, 0, advance=model.advance if model.can_defer else None)
    return assemble_engine(network, CONFIG), pool


def ask(name: str, *prompt: int, num_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize("native", PATHS)
@pytest.mark.parametrize("tensor", ["linear_state", "near_values"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_in_one_state_ends_that_request_alone_and_its_slot_is_zero_again(
    native: bool, tensor: str, poison: float
) -> None:
    subject, _ = model_engine(native=native)
    subject.add(ask("good", 5, 6, 7))
    undisturbed = [token for event in run(subject) for token in event.token_ids]
    subject, pool = model_engine(native=native)
    subject.add(ask("bad", 1, 2, 3))
    subject.add(ask("good", 5, 6, 7))
    events = subject.step() + subject.step()
    pool.buffer.tensors[f"layers.0.{tensor}"][1].fill_(poison)
    events += run(subject)
    ends = {event.request_id: event for event in events if event.finish_reason is not None}
    assert ends["bad"].error is not None
    assert ends["bad"].error.code == "numerical_error"
    assert [token for event in events if event.request_id == "good" for token in event.token_ids] == undisturbed
    assert subject.stats.num_not_finite == 1
    assert not pool.buffer.storage[1:].any()


@pytest.mark.parametrize("native", PATHS)
def test_the_size_of_a_real_state_is_told_by_its_length(native: bool) -> None:
    subject, pool = model_engine(native=native)
    subject._watch = StateWatch(StateNorm(pool.buffer), interval_s=0.0)
    subject.add(ask("a", *range(100), num_tokens=20))
    run(subject)
    norms = subject.stats.state_norms
    assert norms.positions == (0,)
    assert sum(norms.counts[0]) >= 18
    assert len(norms.counts[0]) == len(NORM_BUCKETS) + 1
    assert 0 < norms.sums[0] / sum(norms.counts[0]) <= subject.stats.largest_state_norm < math.inf


def test_without_a_watch_there_are_no_norms() -> None:
    subject = engine(FakeRunner())
    assert (subject.stats.state_norms, subject.stats.largest_state_norm) == (NOTHING_OBSERVED, 0.0)
