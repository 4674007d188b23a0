"""Measures on a running server that a token's log-probability does not depend on how it came to be computed.

The same conversation is decoded token by token, read as one prompt, read up to many places (so in other chunks), read
behind a cached prefix, and all of it again in the company of others. A constant-state model promises that all of them
agree but for rounding; the largest difference says by how much.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clients.client import AsyncClient
from clients.errors import APIResponseError, BadRequestError, NotFoundError
from clients.types import CompletionChoice, GenerationOptions

TEXT = "The state of a conversation has a constant size, so nothing that was said is read again to go on.\n"
NUM_GENERATED = 48
NUM_PLACES = 12
NUM_OTHERS = 7


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison.

    Attributes:
        name: what was compared with the prompt read at once, alone.
        num_values: log-probabilities compared.
        largest: difference among them.
    """

    name: str
    num_values: int
    largest: float


class SelfCheck:
    """One check of one server. `run` does it."""

    def __init__(self, client: AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def run(self) -> list[Finding]:
        """All comparisons.

        Raises:
            clients.errors.ClientError: a request failed, or the server lacks what is needed.
        """
        prompt = await self._prompt()
        tokens, decoded = await self._decode(prompt)
        whole = [*prompt, *tokens]
        scores = await self._scores(whole)
        tail = scores[len(prompt) :]
        places = [len(prompt) + number * len(tokens) // NUM_PLACES for number in range(NUM_PLACES)]
        at_places = [scores[place] for place in places]
        findings = [
            _compare("decoded token by token", decoded, tail),
            _compare("read in other chunks", await self._next(whole, places, cached=False), at_places),
        ]
        await self._next(whole, places[:1], cached=True)
        findings.append(
            _compare("read behind cached prefixes", await self._next(whole, places, cached=True), at_places)
        )
        findings += await self._in_company(prompt, tokens, whole, scores)
        return findings

    async def _in_company(
        self, prompt: list[int], tokens: list[int], whole: list[int], scores: list[float]
    ) -> list[Finding]:
        """Reads and decodes once more while others do the same with other texts."""
        others = [
            asyncio.create_task(self._decode(prompt[number:] + prompt[:number])) for number in range(1, NUM_OTHERS)
        ]
        try:
            again, decoded = await self._decode(prompt, n=2)
            read = await self._scores(whole)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        # Where rounding has chosen another token, what follows is another conversation.
        same = next((n for n, pair in enumerate(zip(again, tokens, strict=True)) if pair[0] != pair[1]), len(tokens))
        tail = scores[len(prompt) :]
        return [
            _compare("read in company", read, scores),
            _compare("decoded in company, one prefill for two", decoded[:same], tail[:same]),
        ]

    async def _prompt(self) -> list[int]:
        try:
            return list(await self._client.tokenize(TEXT, model=self._model))
        except (BadRequestError, NotFoundError):
            return list(range(32))  # a model without a tokenizer

    async def _decode(self, prompt: Sequence[int], *, n: int = 1) -> tuple[list[int], list[float]]:
        """Sampled tokens and their log-probabilities, of the first of n answers."""
        choice = await self._ask(
            prompt, max_tokens=NUM_GENERATED, temperature=1.0, seed=1, ignore_eos=True, logprobs=0, n=n
        )
        extra: dict[str, Any] = choice.model_extra or {}
        tokens = extra.get("token_ids")
        if not isinstance(tokens, list):
            raise APIResponseError("the server returns no token ids")
        return tokens, _values(choice)

    async def _scores(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of a prompt's tokens, read at once; 0 for the first."""
        return _values(await self._ask(tokens, max_tokens=0, echo=True, logprobs=0))

    async def _next(self, tokens: Sequence[int], places: Sequence[int], *, cached: bool) -> list[float]:
        """Log-probabilities of the tokens at these places, each after reading what comes before."""
        values = []
        for place in places:
            choice = await self._ask(
                tokens[:place],
                max_tokens=1,
                temperature=0.0,
                logprobs=0,
                logprob_token_ids=[tokens[place]],
                return_tokens_as_token_ids=True,
                cache_prompt=cached,
            )
            values.append(choice.logprobs["top_logprobs"][0][f"token_id:{tokens[place]}"])
        return values

    async def _ask(self, prompt: Sequence[int], **options: Any) -> CompletionChoice:
        wanted: GenerationOptions = {"return_token_ids": True, **options}  # type: ignore[typeddict-item]
        answer = await self._client.complete(list(prompt), model=self._model, **wanted)
        choice = next((choice for choice in answer.choices if choice.index == 0), None)
        if choice is None or choice.logprobs is None:
            raise APIResponseError("the server gives no log-probabilities")
        return choice


def largest_difference(findings: Sequence[Finding]) -> float:
    """Of all comparisons."""
    return max(finding.largest for finding in findings)


def _values(choice: CompletionChoice) -> list[float]:
    return [0.0 if value is None else value for value in choice.logprobs["token_logprobs"]]


def _compare(name: str, values: Sequence[float], expected: Sequence[float]) -> Finding:
    differences = [abs(value - other) for value, other in zip(values, expected, strict=True)]
    return Finding(name, len(differences), max(differences, default=0.0))
