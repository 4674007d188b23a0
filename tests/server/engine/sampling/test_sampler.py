"""The batched sampler against its naive twin, and each row's independence of the others."""

import math
from collections import Counter
from collections.abc import Sequence as Items

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.sampling.sampler import FAULTY, Sampler
from server.engine.sequence import Chunk, Sequence
from server.engine.transfer import Transfer
from server.engine.types.requests import GenerationRequest, SamplingParams
from tests.server.engine.sampling.naive_sampler import distance_to_edge, naive_adjust, naive_probabilities, naive_sample

VOCAB_SIZE = 12
EOS = (3,)
CPU = torch.device("cpu")


def new_sampler() -> Sampler:
    return Sampler(VOCAB_SIZE, EOS, CPU)


def new_sequence(sampling: SamplingParams, prompt: tuple[int, ...] = (1, 2, 2)) -> Sequence:
    return Sequence(GenerationRequest("any", prompt, sampling), EOS)


def sample(sampler: Sampler, logits: Tensor, rows: Items[tuple[Sequence, int]]) -> list[int]:
    """One step: (sequence, output index) of each row of logits."""
    chunks = [Chunk(sequence, 1, 0, 1, output_index, is_decode=True) for sequence, output_index in rows]
    transfer = Transfer()
    plan = sampler.prepare(chunks, transfer)
    return [int(token) for token in sampler.sample(logits.clone(), plan, transfer.send(CPU)).tolist()]


def sample_one(logits: Items[float], output_index: int = 0, **sampling: object) -> int:
    sequence = new_sequence(SamplingParams(**sampling))  # type: ignore[arg-type]
    return sample(new_sampler(), torch.tensor([logits]), [(sequence, output_index)])[0]


def logits_of(probabilities: Items[float]) -> list[float]:
    return [math.log(probability) for probability in probabilities]


tokens = st.integers(0, VOCAB_SIZE - 1)
sampling_params = st.builds(
    SamplingParams,
    min_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, VOCAB_SIZE, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    logit_bias=st.lists(st.tuples(tokens, st.floats(-5, 5)), max_size=3).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    typical_p=st.sampled_from([1.0, 1.0, 0.8, 0.3]),
    # Eight tokens, of which at most five are suppressed: some token is always left.
    allowed_token_ids=st.one_of(st.just(()), st.permutations(range(VOCAB_SIZE)).map(lambda order: tuple(order[:8]))),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=2).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(sampling_params, min_size=1, max_size=6),
    prompts=st.lists(st.lists(tokens, min_size=1, max_size=5).map(tuple), min_size=6, max_size=6),
    logits_seed=st.integers(0, 2**31),
)
def test_three_steps_of_any_batch_agree_with_the_naive_twin(
    params: list[SamplingParams], prompts: list[tuple[int, ...]], logits_seed: int
) -> None:
    sampler = new_sampler()
    generator = torch.Generator().manual_seed(logits_seed)
    sequences = [new_sequence(sampling, prompt) for sampling, prompt in zip(params, prompts, strict=False)]
    outputs: list[list[int]] = [[] for _ in sequences]
    for index in range(3):
        logits = 3 * torch.randn(len(sequences), VOCAB_SIZE, generator=generator)
        drawn = sample(sampler, logits, [(sequence, index) for sequence in sequences])
        for row, sequence in enumerate(sequences):
            scores = naive_adjust(
                logits[row].tolist(),
                sequence.sampling,
                prompt=sequence.request.prompt_token_ids,
                output=outputs[row],
                eos_token_ids=EOS,
            )
            # Within fp32 rounding of an edge either token is right, and the two may differ from there on.
            assume(distance_to_edge(scores, sequence.sampling, index) > 1e-5)
            assert drawn[row] == naive_sample(scores, sequence.sampling, index)
            outputs[row].append(drawn[row])
            sequence.accept(drawn[row])


@settings(max_examples=80, deadline=None)
@given(params=st.lists(sampling_params, min_size=2, max_size=8), logits_seed=st.integers(0, 2**31))
def test_a_row_draws_the_same_token_alone_and_in_any_company(params: list[SamplingParams], logits_seed: int) -> None:
    logits = torch.randn(len(params), VOCAB_SIZE, generator=torch.Generator().manual_seed(logits_seed))
    rows = [(new_sequence(sampling), 1) for sampling in params]
    together = sample(new_sampler(), logits, rows)
    alone = [sample(new_sampler(), logits[row : row + 1], [rows[row]])[0] for row in range(len(rows))]
    assert together == alone


def test_draws_follow_the_filtered_distribution() -> None:
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 11}
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    expected = naive_probabilities(logits.tolist(), SamplingParams(**sampling))  # type: ignore[arg-type]
    num_draws = 4_000
    sequence = new_sequence(SamplingParams(**sampling))  # type: ignore[arg-type]
    rows = [(sequence, index) for index in range(num_draws)]
    counts = Counter(sample(new_sampler(), logits.expand(num_draws, -1), rows))
    for token, probability in enumerate(expected):
        # Five standard deviations of a binomial; the seed is fixed, so this never flickers.
        deviation = 5 * math.sqrt(probability * (1 - probability) / num_draws)
        assert abs(counts[token] / num_draws - probability) <= deviation


def test_typical_tokens_need_not_be_the_most_likely() -> None:
    # Entropy 1.5 nats: the most likely token says too little, the rare ones too much.
    probabilities = [0.5] + [0.09] * 5 + [0.05 / 6] * 6
    drawn = {sample_one(logits_of(probabilities), seed=seed, typical_p=0.4) for seed in range(60)}
    assert drawn == {1, 2, 3, 4, 5}
    assert sample_one([9.0] + [0.0] * 11, typical_p=1e-9, seed=3) == 0


def test_only_allowed_tokens_come_whatever_their_place() -> None:
    logits = [float(token) for token in range(VOCAB_SIZE)]
    assert sample_one(logits, temperature=0.0, allowed_token_ids=(0, 4, 2)) == 4
    assert {sample_one(logits, seed=seed, allowed_token_ids=(5,), min_tokens=9) for seed in range(9)} == {5}


def test_a_bad_word_is_left_out_only_behind_its_beginning() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 0.0] + [0.0] * 8])
    sequence = new_sequence(SamplingParams(temperature=0.0, bad_words=((2, 1),)))
    assert sequence.depends_on_last_token
    for last, expected in ((2, 2), (5, 1)):
        sequence.accept(last)
        assert sample(new_sampler(), logits, [(sequence, 1)]) == [expected]
    assert sample_one(logits[0].tolist(), temperature=0.0, bad_words=((1,),)) == 2


def test_seed_zero_is_a_seed() -> None:
    flat = [0.0] * VOCAB_SIZE
    zero = [sample_one(flat, index, seed=0) for index in range(20)]
    assert zero == [sample_one(flat, index, seed=0) for index in range(20)]
    assert zero != [sample_one(flat, index, seed=1) for index in range(20)]
    assert len(set(zero)) > 1


def test_temperature_zero_is_greedy_whatever_the_seed() -> None:
    logits = [0.0, 0.1] + [0.0] * (VOCAB_SIZE - 2)
    assert {sample_one(logits, seed=seed, temperature=0.0) for seed in range(20)} == {1}


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-12])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = [float(token % 7) for token in range(VOCAB_SIZE)]
    assert {sample_one(logits, seed=seed, temperature=temperature) for seed in range(20)} == {6}


def test_the_largest_temperature_is_uniform_over_what_is_allowed() -> None:
    logits = [float(token) for token in range(VOCAB_SIZE)]
    drawn = {sample_one(logits, seed=seed, temperature=1e308, min_tokens=1) for seed in range(300)}
    assert drawn == set(range(VOCAB_SIZE)) - set(EOS)


def test_top_k_keeps_ties_at_the_edge() -> None:
    logits = [2.0, 1.0, 1.0] + [0.0] * (VOCAB_SIZE - 3)
    assert {sample_one(logits, seed=seed, top_k=2) for seed in range(100)} == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses_it_and_the_first_always() -> None:
    logits = logits_of([0.5, 0.3, 0.1] + [0.1 / (VOCAB_SIZE - 3)] * (VOCAB_SIZE - 3))
    assert {sample_one(logits, seed=seed, top_p=0.6) for seed in range(100)} == {0, 1}
    assert {sample_one(logits, seed=seed, top_p=1e-300) for seed in range(100)} == {0}


def test_min_p_one_keeps_only_the_most_likely() -> None:
    logits = logits_of([0.4, 0.39, 0.01] + [0.2 / (VOCAB_SIZE - 3)] * (VOCAB_SIZE - 3))
    assert {sample_one(logits, seed=seed, min_p=1.0) for seed in range(50)} == {0}


def test_presence_and_frequency_count_the_output_and_not_the_prompt() -> None:
    sequence = new_sequence(SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=1.0), (0, 0, 0))
    sampler = new_sampler()
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 0] = 5.5
    # 5.5, then 5.5 - 2, 5.5 - 3, ...: below zero, and so another token, from the sixth on.
    drawn = [sample(sampler, logits, [(sequence, index)])[0] for index in range(6)]
    assert drawn[:5] == [0] * 5
    assert drawn[5] != 0


def test_repetition_counts_the_prompt() -> None:
    sequence = new_sequence(SamplingParams(temperature=0, repetition_penalty=2.0), (5,))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 5], logits[0, 6] = 3.0, 2.0
    assert sample(new_sampler(), logits, [(sequence, 0)]) == [6]


def test_a_released_sequence_leaves_no_counts_to_the_next() -> None:
    sampler = new_sampler()
    sampling = SamplingParams(temperature=0, presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4] = 1.0
    first = new_sequence(sampling)
    assert sample(sampler, logits, [(first, 0)]) == [4]
    assert sample(sampler, logits, [(first, 1)]) != [4]
    sampler.release(first)
    assert sample(sampler, logits, [(new_sequence(sampling), 0)]) == [4]


def test_penalty_tables_grow_without_forgetting() -> None:
    sampler = new_sampler()
    sampling = SamplingParams(temperature=0, presence_penalty=2.0)
    sequences = [new_sequence(sampling) for _ in range(5)]
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4] = 1.0
    assert [sample(sampler, logits, [(sequence, 0)]) for sequence in sequences] == [[4]] * 5
    assert all(sample(sampler, logits, [(sequence, 1)]) != [4] for sequence in sequences)


def test_releasing_an_unpenalised_sequence_does_nothing() -> None:
    new_sampler().release(new_sequence(SamplingParams()))


def test_min_tokens_suppresses_every_end_token_until_then() -> None:
    sequence = new_sequence(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(5,)))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3], logits[0, 5], logits[0, 7] = 9.0, 8.0, 1.0
    assert [sample(new_sampler(), logits, [(sequence, index)])[0] for index in range(4)] == [7, 7, 3, 3]


def test_bias_wins_over_penalties_and_suppression_over_bias() -> None:
    logits = [0.0] * VOCAB_SIZE
    bias = ((3, 100.0), (4, 50.0), (4, 1.0))
    assert sample_one(logits, temperature=0.0, logit_bias=bias) == 3
    assert sample_one(logits, temperature=0.0, logit_bias=bias, min_tokens=1) == 4


@pytest.mark.parametrize(("bias", "expected"), [(8.0, 3), (5.0, 5)])
def test_the_repetition_penalty_is_about_the_biased_logit(bias: float, expected: int) -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias=((3, bias),), repetition_penalty=2.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3], logits[0, 5] = 4.0, 5.0
    # Token 3 was in the prompt: (4 + 8) / 2 = 6 is more than 5, and (4 + 5) / 2 = 4.5 is not, though 4 / 2 + 5 is.
    assert sample(new_sampler(), logits, [(new_sequence(sampling, prompt=(3,)), 0)]) == [expected]


def test_a_row_with_every_token_suppressed_still_answers_with_a_token() -> None:
    everything = tuple(range(VOCAB_SIZE))
    for temperature in (0.0, 1.0):
        token = sample_one([0.0] * VOCAB_SIZE, temperature=temperature, min_tokens=1, stop_token_ids=everything)
        assert 0 <= token < VOCAB_SIZE


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_poisoned_row_is_faulty_and_its_neighbours_are_not(poison: float, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, presence_penalty=0.5, top_p=0.9, top_k=4, min_p=0.01)
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows = [(new_sequence(sampling), 0) for _ in range(3)]
    clean = sample(new_sampler(), logits, rows)
    logits[1, 5] = poison
    assert sample(new_sampler(), logits, rows) == [clean[0], FAULTY, clean[2]]


def test_a_fully_poisoned_row_is_faulty() -> None:
    logits = torch.full((1, VOCAB_SIZE), math.nan)
    sampling = SamplingParams(repetition_penalty=1.5, top_k=3)
    assert sample(new_sampler(), logits, [(new_sequence(sampling), 0)]) == [FAULTY]


def test_a_greedy_step_prepares_nothing() -> None:
    chunk = Chunk(new_sequence(SamplingParams(temperature=0)), 1, 0, 1, 0, is_decode=True)
    plan = new_sampler().prepare([chunk], Transfer())
    assert (plan.penalties, plan.bias, plan.suppression, plan.draw) == (None, None, None, None)


def test_plain_sampling_sorts_nothing() -> None:
    chunk = Chunk(new_sequence(SamplingParams(temperature=1)), 1, 0, 1, 0, is_decode=True)
    draw = new_sampler().prepare([chunk], Transfer()).draw
    assert draw is not None
    assert (draw.rows, draw.min_p, draw.top_k, draw.top_p) == (None, None, None, None)
