"""Log-probabilities on tiny models, against the naive way: the whole text through the model at once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from dijiang_model.serving.network import FrozenModel
from server.engine.engine import Engine
from server.engine.runner import ModelRunner
from server.engine.sampling.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.state.pool import StatePool
from server.engine.types.logprobs import LogprobOptions, LogprobRow, LogprobTable
from server.engine.types.requests import FinishReason, GenerationRequest, SamplingParams
from tests.read_at_once import log_probabilities
from tests.server.engine.fakes import engine_info
from tests.server.engine.fakes import request as fake_request
from tests.tiny_models import gpt_neox_config, llama_config, tiny_network

CPU = torch.device("cpu")
MODELS = {"hybrid llama": llama_config(), "released gpt_neox": gpt_neox_config()}
TOLERANCE = 2e-5
"""Between a prompt in chunks and at once: a few roundings of fp32 sums at logits of order 1."""


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> FrozenModel:
    return tiny_network(MODELS[request.param])


@dataclass
class Scored:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    output: list[LogprobRow] = field(default_factory=list)
    prompt: list[LogprobRow] = field(default_factory=list)
    prompt_events: int = 0
    reason: FinishReason | None = None


def run(
    model: FrozenModel,
    requests: Iterable[GenerationRequest],
    *,
    max_step_tokens: int = 16,
    max_scored_tokens: int | None = None,
    num_ahead: int = 0,
) -> dict[str, Scored]:
    config = model.config
    scheduler = Scheduler(
        num_slots=4,
        max_step_tokens=max_step_tokens,
        max_waiting=100,
        vocab_size=config.vocab_size,
        max_scored_tokens=max_scored_tokens,
    )
    sampler = Sampler(config.vocab_size, (), CPU)
    runner = ModelRunner(model, pool=StatePool(model.state_spec, 4), sampler=sampler, device=CPU)
    engine = Engine(scheduler=scheduler, runner=runner, info=engine_info(), num_ahead=num_ahead)
    answers: dict[str, Scored] = {}
    for request in requests:
        answers[request.request_id] = Scored()
        assert engine.add(request) is None
    while engine.has_work:
        for event in engine.step():
            answer = answers[event.request_id]
            assert answer.reason is None
            answer.tokens += event.token_ids
            answer.reason = event.finish_reason
            if event.logprobs is not None:
                answer.output += event.logprobs.rows()
            if event.prompt_logprobs is not None:
                answer.prompt += event.prompt_logprobs.rows()
                answer.prompt_events += 1
    return answers


def make_request(
    name: str, length: int, options: LogprobOptions, *, max_tokens: int = 6, **sampling: object
) -> GenerationRequest:
    generator = torch.Generator().manual_seed(length)
    prompt = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
    values = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
    return GenerationRequest(name, prompt, SamplingParams(**values), logprobs=options)  # type: ignore[arg-type]


def check_rows(rows: list[LogprobRow], token_ids: list[int], expected: Tensor, *, num_top: int) -> None:
    """Rows are those of these tokens under the expected distributions [T, vocab]."""
    assert [row.token_ids[0] for row in rows] == token_ids
    for row, distribution in zip(rows, expected, strict=True):
        given = torch.tensor(row.values)
        torch.testing.assert_close(given, distribution[list(row.token_ids)], atol=TOLERANCE, rtol=0)
        best = distribution.topk(num_top).values
        torch.testing.assert_close(given[1 : 1 + num_top], best, atol=TOLERANCE, rtol=0)
        close = (distribution - distribution[row.token_ids[0]]).abs() < TOLERANCE
        rank = int((distribution > distribution[row.token_ids[0]]).sum()) + 1
        assert abs(row.rank - rank) <= int(close.sum()) - 1
        if row.token_ids[0] in row.token_ids[1:]:
            again = row.token_ids.index(row.token_ids[0], 1)
            assert row.values[again] == row.values[0]


@pytest.mark.parametrize("num_ahead", [0, 1])
@pytest.mark.parametrize(("max_step_tokens", "max_scored_tokens"), [(4, None), (16, 3), (512, None)])
def test_log_probabilities_are_those_of_the_model(
    model: FrozenModel, max_step_tokens: int, max_scored_tokens: int | None, num_ahead: int
) -> None:
    requests = [
        make_request("both", 37, LogprobOptions(num_output=3, num_prompt=5)),
        make_request("output", 9, LogprobOptions(num_output=0)),
        make_request("neither", 20, LogprobOptions()),
        make_request("sampled", 23, LogprobOptions(num_output=20, num_prompt=0), temperature=1.5, seed=3),
        make_request("one token", 1, LogprobOptions(num_output=1, num_prompt=1)),
    ]
    answers = run(
        model,
        requests,
        max_step_tokens=max_step_tokens,
        max_scored_tokens=max_scored_tokens,
        num_ahead=num_ahead,
    )
    for request in requests:
        answer, prompt, options = answers[request.request_id], request.prompt_token_ids, request.logprobs
        expected = log_probabilities(model, (*prompt, *answer.tokens))
        assert answer.reason is FinishReason.LENGTH
        assert len(answer.tokens) == 6
        if options.num_output is None:
            assert answer.output == []
        else:
            of_output = expected[len(prompt) - 1 : -1]
            check_rows(answer.output, answer.tokens, of_output, num_top=options.num_output)
        if options.num_prompt is None:
            assert answer.prompt == []
        else:
            check_rows(answer.prompt, list(prompt[1:]), expected[: len(prompt) - 1], num_top=options.num_prompt)


def test_further_tokens_come_behind_the_most_likely_ones_of_the_output(model: FrozenModel) -> None:
    wide = make_request("wide", 12, LogprobOptions(num_output=2, num_prompt=1, token_ids=(7, 250, 0)))
    narrow = make_request("narrow", 5, LogprobOptions(num_output=0, token_ids=(9,)))
    answers = run(model, [wide, narrow])
    expected = log_probabilities(model, (*wide.prompt_token_ids, *answers["wide"].tokens))
    for place, row in enumerate(answers["wide"].output, start=11):
        assert row.token_ids[-3:] == (7, 250, 0)
        torch.testing.assert_close(torch.tensor(row.values[-3:]), expected[place, [7, 250, 0]], atol=TOLERANCE, rtol=0)
        assert len(row.token_ids) == 1 + 2 + 3
    check_rows(answers["wide"].prompt, list(wide.prompt_token_ids[1:]), expected[:11], num_top=1)
    assert [row.token_ids[1:] for row in answers["narrow"].output] == [(9,)] * 6


def test_they_are_of_the_model_whatever_shapes_the_sampling(model: FrozenModel) -> None:
    shaped = make_request(
        "shaped",
        8,
        LogprobOptions(num_output=4),
        temperature=0.3,
        top_k=2,
        repetition_penalty=1.7,
        frequency_penalty=1.0,
        logit_bias=((5, 50.0),),
        min_tokens=6,
    )
    answer = run(model, [shaped])["shaped"]
    assert answer.tokens[0] == 5
    expected = log_probabilities(model, (*shaped.prompt_token_ids, *answer.tokens))
    check_rows(answer.output, answer.tokens, expected[7:-1], num_top=4)


def test_asking_changes_no_token(model: FrozenModel) -> None:
    asking = [
        make_request(f"r{n}", 3 + 5 * n, LogprobOptions(num_output=n, num_prompt=n), temperature=float(n % 2))
        for n in range(6)
    ]
    silent = [replace(request, logprobs=LogprobOptions()) for request in asking]
    with_rows, without = run(model, asking), run(model, silent)
    assert {name: answer.tokens for name, answer in with_rows.items()} == {
        name: answer.tokens for name, answer in without.items()
    }


def test_no_token_is_generated_where_none_is_wanted(model: FrozenModel) -> None:
    request = make_request("a", 30, LogprobOptions(num_prompt=1, num_output=1), max_tokens=0)
    answer = run(model, [request])["a"]
    assert (answer.tokens, answer.output, answer.reason) == ([], [], FinishReason.LENGTH)
    assert len(answer.prompt) == 29


def test_a_prompt_is_scored_in_pieces_that_are_reported_as_they_come(model: FrozenModel) -> None:
    request = make_request("a", 50, LogprobOptions(num_prompt=2), max_tokens=1)
    answer = run(model, [request], max_step_tokens=64, max_scored_tokens=8)["a"]
    assert answer.prompt_events == 7
    assert [row.token_ids[0] for row in answer.prompt] == list(request.prompt_token_ids[1:])


def test_scored_prompts_share_the_rows_of_a_step_in_turn() -> None:
    scheduler = Scheduler(num_slots=3, max_step_tokens=64, max_waiting=9, vocab_size=50, max_scored_tokens=4)
    for name in ("a", "b"):
        scored = fake_request(name, *range(6), max_tokens=1)
        scheduler.add(replace(scored, logprobs=LogprobOptions(num_prompt=0)))
    scheduler.add(fake_request("plain", *range(20), max_tokens=1))
    shapes = []
    for _ in range(3):
        batch = scheduler.next_batch()
        assert batch is not None
        shapes.append([(chunk.sequence.request_id, chunk.length) for chunk in batch.chunks])
    assert shapes == [[("a", 4), ("plain", 20)], [("a", 2), ("b", 3)], [("b", 3)]]


def test_tables_hold_what_is_put_in() -> None:
    table = LogprobTable.of([[5, 9, 5], [2, 2, 7]], [[-1.5, -0.5, -1.5], [-0.25, -0.25, -math.inf]])
    assert table.num_rows == 2
    assert [row.rank for row in table.rows()] == [2, 1]
    assert table.rows()[1].values == (-0.25, -0.25, -math.inf)
    assert table.head(1).rows() == table.rows()[:1]
