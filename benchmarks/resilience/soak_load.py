"""What the clients of a soak do, and what they write down: answers, streams that are left, deadlines, bad input, saved
states and responses, all at random and again and again.

Right answers are known beforehand: greedy continuations of a few prompts, asked for once while nothing else ran. A
request may be refused or cut off by a kill; it may not hang, and an answer that ends well has the right tokens.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS, FIRST_PART = 8, 24, 24, 10
LONG_TOKENS = 3_000
MAX_STATES = 40
PAUSE_S = 0.1
BACK_WITHIN_S = 120.0
"""A server that was killed is there again after that time, and every request has ended."""
Refusals = frozenset({408, 429, 503, 504})
REPORTED = 20


@dataclass(slots=True)
class Notes:
    """What was seen.

    Attributes:
        done: by kind, how often it went well; refusals and connections that a kill cut are kinds too.
        problems: what must not be, in words.
        states: saved ones, by id, each with the prompt that it is of.
        responses: ids of stored responses.
        endings: ids of responses in the background whose end is not known.
    """

    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)
    responses: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Writes down what must not be."""
        self.problems.append(text)


class Load:
    """Clients of one server, whose address stays while it is killed and started.

    Attributes:
        notes: what they have seen.
        stopping: to be set for each to end with its present request.
        doing: what they do now.
    """

    def __init__(self, base_url: str, key: str, *, seed: int = 0) -> None:
        self.notes = Notes()
        self.stopping = False
        self.doing: list[str] = []
        self._random = random.Random(seed)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(
            base_url=base_url, timeout=BACK_WITHIN_S, headers=headers, trust_env=False, limits=limits
        )
        self.prompts = [self._tokens(PROMPT_TOKENS) for _ in range(NUM_PROMPTS)]
        self.right: list[list[int]] = []
        self._kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.answer, 6),
            (self.leave, 4),
            (self.miss_deadline, 2),
            (self.send_nonsense, 3),
            (self.save, 2),
            (self.resume, 3),
            (self.respond, 2),
            (self.respond_later, 1),
            (self.structure, 1),
            (self.read_long, 1),
        ]

    async def learn(self) -> None:
        """Asks for the right answers, one after the other."""
        for prompt in self.prompts:
            answer = await self.http.post("/v1/completions", json=self._body(prompt, ANSWER_TOKENS))
            answer.raise_for_status()
            self.right.append(answer.json()["choices"][0]["token_ids"])

    async def run(self, num_clients: int) -> None:
        """So many clients, each with one request after the other, until `stopping`."""
        await asyncio.gather(*(self._client() for _ in range(num_clients)))

    async def _client(self) -> None:
        kinds, weights = zip(*self._kinds, strict=True)
        while not self.stopping:
            (act,) = self._random.choices(kinds, weights)
            begin = time.monotonic()
            self.doing.append(act.__name__)
            try:
                await act()
            except httpx.TimeoutException:
                self.notes.problem(f"{act.__name__}: silent for {time.monotonic() - begin:.0f} s")
            except (httpx.TransportError, json.JSONDecodeError):
                self.notes.done["cut off"] += 1
                await asyncio.sleep(PAUSE_S)
            finally:
                self.doing.remove(act.__name__)

    # What a client does.

    async def answer(self) -> None:
        number = self._random.randrange(NUM_PROMPTS)
        await self._complete("answer", number, self.prompts[number], self.right[number])

    async def leave(self) -> None:
        """A stream that the client leaves after some events."""
        body = self._body(self._tokens(40), 4_000, stream=True)
        most = self._random.randrange(30)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                most -= 1
                if most <= 0:
                    break
        self._count("left", response.status_code)

    async def miss_deadline(self) -> None:
        response = await self.http.post("/v1/completions", json=self._body(self._tokens(20), 60_000, timeout=0.3))
        self._count("deadline", response.status_code, wanted=504)

    async def send_nonsense(self) -> None:
        bodies: list[bytes] = [
            b"{",
            b'{"prompt": 1e400}',
            b'{"prompt": "x", "max_tokens": -1}',
            b'{"prompt": [999999999]}',
            b'{"prompt": "x", "n": 5000}',
            b'{"prompt": "x", "structured_outputs": {"regex": "("}}',
            b"[" * 5_000,
        ]
        content, head = self._random.choice(bodies), {"content-type": "application/json"}
        response = await self.http.post("/v1/completions", content=content, headers=head)
        self._count("bad input", response.status_code, wanted=400)

    async def save(self) -> None:
        """A conversation that is saved in the midst of a known answer."""
        if len(self.notes.states) >= MAX_STATES:
            await self._delete()
            return
        number = self._random.randrange(NUM_PROMPTS)
        body = self._body(self.prompts[number], FIRST_PART, return_state={})
        choice = await self._complete("saved", number, body, self.right[number][:FIRST_PART])
        if choice is not None and choice["state_id"] is not None:
            self.notes.states[choice["state_id"]] = number

    async def resume(self) -> None:
        if not self.notes.states:
            return
        state_id, number = self._random.choice([*self.notes.states.items()])
        await self.check_state(state_id, number)

    async def check_state(self, state_id: str, number: int) -> None:
        """Whether a conversation goes on as it must."""
        body = self._body(None, ANSWER_TOKENS - FIRST_PART, state_id=state_id)
        response = await self.http.post("/v1/completions", json=body)
        if response.status_code == 404 and state_id not in self.notes.states:
            return  # another client has deleted it meanwhile
        self._compare("resumed", response, self.right[number][FIRST_PART:], f"state {state_id}")

    async def _delete(self) -> None:
        state_id = self._random.choice([*self.notes.states])
        del self.notes.states[state_id]
        response = await self.http.delete(f"/v1/states/{state_id}")
        self._count("deleted", response.status_code, or_else=404)

    async def respond(self) -> None:
        body = {"input": "Say something.", "max_output_tokens": 8}
        response = await self.http.post("/v1/responses", json=body)
        if self._count("response", response.status_code):
            self.notes.responses.append(response.json()["id"])

    async def respond_later(self) -> None:
        body = {"input": "Say something else.", "max_output_tokens": 40, "background": True}
        response = await self.http.post("/v1/responses", json=body)
        if self._count("background response", response.status_code):
            self.notes.endings.append(response.json()["id"])

    async def structure(self) -> None:
        body = self._body("Yes or no? ", 5, structured_outputs={"choice": ["yes", "no"]})
        response = await self.http.post("/v1/completions", json=body)
        if self._count("structured", response.status_code):
            text = response.json()["choices"][0]["text"]
            if text not in ("yes", "no"):
                self.notes.problem(f"a structured answer is {text[:40]!r}")

    async def read_long(self) -> None:
        """A stream: who reads a long prompt may take long, but says so now and then."""
        body = self._body(self._tokens(LONG_TOKENS), 1, stream=True)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        if response.status_code != 200 or (lines and lines[-1] == "data: [DONE]"):
            self._count("long prompt", response.status_code)

    # What is common to these.

    async def _complete(
        self, kind: str, number: int, prompt: list[int] | dict[str, Any], right: list[int]
    ) -> dict[str, Any] | None:
        body = prompt if isinstance(prompt, dict) else self._body(prompt, ANSWER_TOKENS)
        return self._compare(kind, await self.http.post("/v1/completions", json=body), right, f"prompt {number}")

    def _compare(self, kind: str, response: httpx.Response, right: list[int], what: str) -> dict[str, Any] | None:
        """The choice of an answer with the right tokens; None, written down, of any other."""
        if not self._count(kind, response.status_code):
            return None
        choice: dict[str, Any] = response.json()["choices"][0]
        if choice["token_ids"] == right:
            return choice
        self.notes.problem(f"{kind}: wrong tokens for {what}: {choice['token_ids']} instead of {right}")
        return None

    def _count(self, kind: str, status: int, *, wanted: int = 200, or_else: int = 0) -> bool:
        """Whether a request has ended as it must; refusals are no problem, anything else is."""
        if status in (wanted, or_else):
            self.notes.done[kind] += 1
            return True
        if status in Refusals:
            self.notes.done[f"refused with {status}"] += 1
        else:
            self.notes.problem(f"{kind}: status {status}")
        return False

    def _body(self, prompt: list[int] | str | None, max_tokens: int, **fields: Any) -> dict[str, Any]:
        body = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
        return body if prompt is None else {"prompt": prompt, **body}

    def _tokens(self, num: int) -> list[int]:
        return [1 + self._random.randrange(90) for _ in range(num)]
