"""Measures on the running engine that a token's log-probability does not depend on how it came to be computed.

The same tokens are decoded one by one, read at once, read in many other chunks, read behind cached prefixes, and all
of it again in a batch with others. A constant-state model promises that all of them agree but for rounding; the
largest difference says by how much. What the server does meanwhile for its clients shares its steps, too.
"""

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from server.engine.types.logprobs import LogprobOptions, LogprobTable
from server.engine.types.requests import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.engine.types.state import NO_STATE
from server.errors import InternalError
from server.states.session import error_of

NUM_PLACES = 6
NOT_FINITE = 1e9
"""The difference where one of two log-probabilities is NaN or infinite."""
NUM_OTHERS = 5
NUM_SINGLE_TOKENS = 32
MULTIPLIER, INCREMENT = 1_103_515_245, 12_345
"""Of a linear congruential generator: the prompt is any text, the same in every check."""


class SubmittingEngine(Protocol):
    """What is needed of the engine client here."""

    def submit(self, request: GenerationRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison.

    Attributes:
        name: what was compared with the prompt read at once.
        num_values: log-probabilities compared; 0: it could not be done here.
        largest: difference among them.
    """

    name: str
    num_values: int
    largest: float


@dataclass(slots=True)
class _Answer:
    """What one engine request brought: log-probabilities of the prompt's tokens from the second on, and of the output's
    with those of `LogprobOptions.token_ids` behind."""

    token_ids: list[int]
    prompt: list[float]
    output: list[tuple[float, ...]]
    num_cached_tokens: int = 0


class SelfCheck:
    """One check of one engine. `run` does it."""

    def __init__(self, engine: SubmittingEngine, *, vocab_size: int, num_prompt: int, num_generated: int) -> None:
        """
        Args:
            engine: a ready one.
            vocab_size: tokens of the model.
            num_prompt: length of the prompt, >= 16.
            num_generated: tokens decoded after it, >= 8.
        """
        self._engine = engine
        self._prompt = pseudo_random_tokens(num_prompt, vocab_size)
        self._num_generated = num_generated

    async def run(self) -> list[Finding]:
        """All comparisons.

        Raises:
            ServiceError: the engine cannot do it now.
        """
        decoded = await self._decode(self._prompt)
        whole = (*self._prompt, *decoded.token_ids)
        scores = await self._scores(whole)
        tail = scores[len(self._prompt) - 1 :]
        findings = [_compare("decoded token by token", [row[0] for row in decoded.output], tail)]
        for name, cuts in chunkings(len(whole)).items():
            findings.append(_compare(name, await self._scores(whole, cuts=cuts), scores))
        findings += await self._cached(whole, scores)
        return findings + await self._in_a_batch(whole, scores, decoded.token_ids)

    async def _cached(self, whole: tuple[int, ...], scores: list[float]) -> list[Finding]:
        """The likelihood of single tokens behind what was read just now, and behind a cached part of it."""
        namespace = secrets.token_hex(16)
        first = len(self._prompt)
        places = [first + number * (len(whole) - first - 1) // NUM_PLACES for number in range(NUM_PLACES)]
        points = tuple(sorted({place - 1 - 3 * number for number, place in enumerate(places)}))
        await self._ask(self._one(whole, namespace=namespace, points=points, next_token=whole[-1]))
        fresh, cached, expected_cached = [], [], []
        for place in places:
            alone = await self._ask(self._one(whole[:place], next_token=whole[place]))
            fresh.append(alone.output[0][-1])
            behind = await self._ask(self._one(whole[:place], namespace=namespace, next_token=whole[place]))
            if behind.num_cached_tokens > 0:
                cached.append(behind.output[0][-1])
                expected_cached.append(scores[place - 1])
        expected = [scores[place - 1] for place in places]
        return [
            _compare("read up to many places", fresh, expected),
            _compare("read behind cached prefixes", cached, expected_cached),
        ]

    async def _in_a_batch(self, whole: tuple[int, ...], scores: list[float], tokens: list[int]) -> list[Finding]:
        others = [
            asyncio.create_task(self._decode((*self._prompt[number:], *self._prompt[:number])))
            for number in range(1, NUM_OTHERS + 1)
        ]
        try:
            again, read = await asyncio.gather(self._decode_twice(tokens), self._scores(whole))
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        # Where rounding has chosen another token, what follows is another conversation; its own place still counts.
        pairs = zip(again.token_ids, tokens, strict=True)
        num_alike = next((number for number, pair in enumerate(pairs, start=1) if pair[0] != pair[1]), len(tokens))
        decoded = [row[1 + place] for place, row in enumerate(again.output[:num_alike])]
        tail = scores[len(self._prompt) - 1 :]
        return [
            _compare("read in a batch with others", read, scores),
            _compare("decoded in a batch with others, one prefill for two", decoded, tail[:num_alike]),
        ]

    async def _decode(
        self, prompt: tuple[int, ...], *, group: str | None = None, watched: Sequence[int] = ()
    ) -> _Answer:
        """Sampled tokens, their log-probabilities, and those of the watched tokens in their place."""
        sampling = SamplingParams(max_tokens=self._num_generated, temperature=1.0, seed=1, ignore_eos=True)
        logprobs = LogprobOptions(num_output=0, token_ids=tuple(watched))
        return await self._ask(GenerationRequest(_name(), prompt, sampling, logprobs=logprobs, group=group))

    async def _decode_twice(self, watched: Sequence[int]) -> _Answer:
        """The second of two equal answers to one prompt."""
        group = _name()
        _, second = await asyncio.gather(*(self._decode(self._prompt, group=group, watched=watched) for _ in range(2)))
        return second

    async def _scores(self, tokens: tuple[int, ...], *, cuts: tuple[int, ...] = ()) -> list[float]:
        """Log-probabilities of a prompt's tokens, from the second one on."""
        sampling = SamplingParams(max_tokens=0, temperature=0.0)
        request = GenerationRequest(_name(), tokens, sampling, logprobs=LogprobOptions(num_prompt=0), cuts=cuts)
        return (await self._ask(request)).prompt

    def _one(
        self, prompt: tuple[int, ...], *, next_token: int, namespace: str | None = None, points: tuple[int, ...] = ()
    ) -> GenerationRequest:
        """One token after a prompt, and how likely `next_token` is in its place."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        states = replace(NO_STATE, cache_namespace=namespace, cache_points=points)
        logprobs = LogprobOptions(num_output=0, token_ids=(next_token,))
        return GenerationRequest(_name(), prompt, sampling, states=states, logprobs=logprobs)

    async def _ask(self, request: GenerationRequest) -> _Answer:
        answer = _Answer([], [], [])
        async with self._engine.submit(request) as events:
            async for event in events:
                if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise error_of(event.error)
                answer.token_ids += event.token_ids
                answer.prompt += [row[0] for row in _rows(event.prompt_logprobs)]
                answer.output += _rows(event.logprobs)
                answer.num_cached_tokens += event.num_cached_tokens
        if request.logprobs.num_prompt is not None and len(answer.prompt) != len(request.prompt_token_ids) - 1:
            raise InternalError("the engine has not scored the whole prompt")
        return answer


def chunkings(num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Lengths of a prompt at which a step ends, by what they do: odd and even places, single tokens at the end."""
    growing = [size * (size + 1) // 2 for size in range(1, num_tokens)]
    halving = [num_tokens - (num_tokens >> shift) for shift in range(1, num_tokens.bit_length())]
    alone = range(max(1, num_tokens - NUM_SINGLE_TOKENS), num_tokens)
    ways: Mapping[str, Iterable[int]] = {
        "read in chunks of 1, 2, 3, ...": growing,
        "read in chunks that halve what is left": halving,
        "read in chunks of 31": range(31, num_tokens, 31),
        "the end read token by token": alone,
    }
    return {name: tuple(sorted({cut for cut in cuts if 0 < cut < num_tokens})) for name, cuts in ways.items()}


def pseudo_random_tokens(num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Any tokens, the same ones every time."""
    tokens, number = [], 1
    for _ in range(num_tokens):
        number = (number * MULTIPLIER + INCREMENT) % 2**31
        tokens.append((number >> 8) % vocab_size)
    return tuple(tokens)


def largest_difference(findings: Sequence[Finding]) -> float:
    """Of all comparisons."""
    return max(finding.largest for finding in findings)


def _rows(table: LogprobTable | None) -> list[tuple[float, ...]]:
    return [] if table is None else [row.values for row in table.rows()]


def _name() -> str:
    return f"selfcheck-{secrets.token_hex(12)}"


def _compare(name: str, values: Sequence[float], expected: Sequence[float]) -> Finding:
    differences = [_difference(value, other) for value, other in zip(values, expected, strict=True)]
    return Finding(name, len(differences), max(differences, default=0.0))


def _difference(value: float, other: float) -> float:
    difference = 0.0 if value == other else abs(value - other)
    return difference if math.isfinite(difference) else NOT_FINITE
