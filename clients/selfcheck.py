"""Measures on a running server that a token's log-probability does not depend on how it came to be computed.

The same text is decoded token by token, read as one prompt, read up to many places, read piece by piece into a saved
state (so in chunks of 1, 2, 3, 5, ... tokens), read behind cached prefixes, and all of it again in the company of
others. A constant-state model promises that all of them agree but for rounding; the largest difference says by how
much.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from clients.client import AsyncClient
from clients.errors import APIResponseError, BadRequestError, NotFoundError
from clients.states import delete
from clients.types import CompletionChoice, GenerationOptions

TEXT = (
    "The state of a conversation has a constant size, so nothing that was said is read again to go on. What a reader "
    "remembers of a long book is not the book: a handful of people, a house by the sea, the weather on the day when "
    "everything changed. A new sentence is weighed against all of that at once, and at no greater cost on the last "
    "page than on the first. Whoever goes back to look something up has to turn the pages, one by one, and the more "
    "of them there are, the longer it takes. Both ways of reading have their merits; here only the first is tried, in "
    "as many ways as there are: word by word, page by page, in one go, from a bookmark, and in a room where others "
    "are reading aloud.\n"
)
NUM_GENERATED = 48
NUM_PLACES = 6
NUM_OTHERS = 5
STATE_TTL_S = 600.0
SAMPLED: dict[str, Any] = {
    "max_tokens": NUM_GENERATED,
    "temperature": 1.0,
    "seed": 1,
    "ignore_eos": True,
    "logprobs": 0,
}


class _NoStatesError(Exception):
    """The server has not answered with a state."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison.

    Attributes:
        name: what was compared with the prompt read at once, alone.
        num_values: log-probabilities compared; 0: the server cannot do it so.
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
            _compare("read up to many places", await self._next(whole, places, cached=False), at_places),
        ]
        cuts, pieced = await self._in_pieces(whole)
        findings.append(_compare("read piece by piece into a state", pieced, [scores[cut] for cut in cuts]))
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
            asyncio.create_task(self._decode(prompt[number:] + prompt[:number])) for number in range(1, NUM_OTHERS + 1)
        ]
        try:
            decoded = await self._decode_again(prompt, tokens)
            read = await self._scores(whole)
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        tail = scores[len(prompt) :]
        return [
            _compare("read in a batch with others", read, scores),
            _compare("decoded in a batch with others, one prefill for two", decoded, tail[: len(decoded)]),
        ]

    async def _in_pieces(self, tokens: list[int]) -> tuple[list[int], list[float]]:
        """Places, and log-probabilities there behind ever longer pieces, each read into the state before it."""
        cuts, states, values = _growing(len(tokens)), list[str](), list[float]()
        try:
            for begin, end in pairwise([0, *cuts]):
                before: dict[str, Any] = {"state_id": states[-1]} if states else {}
                piece = tokens[begin:end]
                values.append(await self._likelihood(piece, tokens[end], cache_prompt=False, **before))
                states.append(await self._advance(piece, before))
        except (BadRequestError, NotFoundError, _NoStatesError):
            return [], []  # a server that keeps no states
        finally:
            for state in states:
                await self._client.answer(delete(state))
        return cuts, values

    async def _advance(self, piece: Sequence[int], before: Mapping[str, Any]) -> str:
        """The state after one more piece."""
        wanted: GenerationOptions = {"max_tokens": 0, "return_state": {"ttl_s": STATE_TTL_S}, **before}  # type: ignore[typeddict-item]
        answer = await self._client.complete(list(piece), model=self._model, **wanted)
        state_id = (answer.choices[0].model_extra or {}).get("state_id") if answer.choices else None
        if not isinstance(state_id, str):
            raise _NoStatesError
        return state_id

    async def _prompt(self) -> list[int]:
        try:
            return list(await self._client.tokenize(TEXT, model=self._model))
        except (BadRequestError, NotFoundError):
            return list(range(32))  # a model without a tokenizer

    async def _decode(self, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        """Sampled tokens and their log-probabilities."""
        choice = await self._ask(prompt, **SAMPLED)
        return _token_ids(choice), _values(choice)

    async def _decode_again(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of these tokens, as far as the first of two answers says the same.

        Where rounding has chosen another token, what follows is another conversation; its own place still counts.
        """
        more = {"logprob_token_ids": list(tokens), "return_tokens_as_token_ids": True}
        choice = await self._ask(prompt, **SAMPLED, **more, n=2)
        values = []
        for token, said, top in zip(tokens, _token_ids(choice), choice.logprobs["top_logprobs"], strict=True):
            values.append(top[f"token_id:{token}"])
            if said != token:
                break
        return values

    async def _scores(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of a prompt's tokens, read at once; 0 for the first."""
        return _values(await self._ask(tokens, max_tokens=0, echo=True, logprobs=0))

    async def _next(self, tokens: Sequence[int], places: Sequence[int], *, cached: bool) -> list[float]:
        """Log-probabilities of the tokens at these places, each after reading what comes before."""
        return [await self._likelihood(tokens[:place], tokens[place], cache_prompt=cached) for place in places]

    async def _likelihood(self, prompt: Sequence[int], token: int, **options: Any) -> float:
        """Log-probability of a token after a prompt."""
        wanted = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "logprob_token_ids": [token], **options}
        choice = await self._ask(prompt, **wanted, return_tokens_as_token_ids=True)
        value: float = choice.logprobs["top_logprobs"][0][f"token_id:{token}"]
        return value

    async def _ask(self, prompt: Sequence[int], **options: Any) -> CompletionChoice:
        wanted: GenerationOptions = {"return_token_ids": True, **options}  # type: ignore[typeddict-item]
        answer = await self._client.complete(list(prompt), model=self._model, **wanted)
        choice = next((choice for choice in answer.choices if choice.index == 0), None)
        if choice is None or choice.logprobs is None:
            raise APIResponseError("the server gives no log-probabilities")
        return choice


def _growing(num_tokens: int) -> list[int]:
    """Ends of pieces of 1, 2, 3, 5, 8, ... tokens, the last one before the last token."""
    cuts, piece, following = [1], 2, 3
    while cuts[-1] + piece < num_tokens:
        cuts.append(cuts[-1] + piece)
        piece, following = following, piece + following
    return cuts


def _token_ids(choice: CompletionChoice) -> list[int]:
    tokens = (choice.model_extra or {}).get("token_ids")
    if not isinstance(tokens, list):
        raise APIResponseError("the server returns no token ids")
    return tokens


def largest_difference(findings: Sequence[Finding]) -> float:
    """Of all comparisons."""
    return max(finding.largest for finding in findings)


def _values(choice: CompletionChoice) -> list[float]:
    return [0.0 if value is None else value for value in choice.logprobs["token_logprobs"]]


def _compare(name: str, values: Sequence[float], expected: Sequence[float]) -> Finding:
    differences = [abs(value - other) for value, other in zip(values, expected, strict=True)]
    return Finding(name, len(differences), max(differences, default=0.0))
