"""Concurrent clients that stream answers, and what they saw."""

import asyncio
import statistics
import time
from dataclasses import dataclass, field

from clients.client import AsyncClient

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Seen:
    """What one request saw.

    Attributes:
        first_s: from sending to the first token, seconds.
        gaps_s: between tokens that came one by one, seconds; tokens of one piece share its gap.
        num_tokens: of the answer, by the server's count.
    """

    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What every client does: `num_requests` answers of `max_tokens` tokens to `prompt_tokens` tokens, one by one."""

    prompt_tokens: int
    max_tokens: int
    num_requests: int

    async def run(self, address: str, api_key: str | None, model: str, num_clients: int) -> tuple[float, list[Seen]]:
        """All clients at once, each with a connection of its own; seconds in all, and what each request saw."""
        clients = [AsyncClient(address, api_key=api_key) for _ in range(num_clients)]
        try:
            started = time.perf_counter()
            found = await asyncio.gather(
                *(self._client(client, model, number) for number, client in enumerate(clients))
            )
            return time.perf_counter() - started, [seen for answers in found for seen in answers]
        finally:
            await asyncio.gather(*(client.close() for client in clients))

    async def _client(self, client: AsyncClient, model: str, number: int) -> list[Seen]:
        return [
            await self._request(client, model, number * self.num_requests + turn) for turn in range(self.num_requests)
        ]

    async def _request(self, client: AsyncClient, model: str, number: int) -> Seen:
        seen = Seen()
        # Token ids, so that the length is exact; no two prompts begin alike, so that no cache answers.
        prompt = [
            1 + (number + 1) * 7 % 199,
            *(1 + (number * 31 + index * 7) % 199 for index in range(1, self.prompt_tokens)),
        ]
        last_s = time.perf_counter()
        async with client.stream_complete(
            prompt,
            model=model,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            temperature=0.0,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        ) as stream:
            async for chunk in stream:
                now_s = time.perf_counter()
                count = chunk.usage.completion_tokens if chunk.usage is not None else seen.num_tokens
                if count == seen.num_tokens:
                    continue
                if seen.num_tokens == 0:
                    seen.first_s = now_s - last_s
                else:
                    seen.gaps_s += [(now_s - last_s) / (count - seen.num_tokens)] * (count - seen.num_tokens)
                seen.num_tokens, last_s = count, now_s
        return seen


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    """`{"p50": ..., "p90": ..., "p99": ...}` in ms; of no values, none."""
    if not seconds:
        return {}
    if len(seconds) == 1:
        return {f"p{share}": 1e3 * seconds[0] for share in PERCENTILES}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{share}": 1e3 * cuts[share - 1] for share in PERCENTILES}
