"""The answers of one request while they grow: one engine request and one text stream for each choice.

`Generation` submits them all before the first byte is answered, merges their pieces in the order in
which they come, and leaves the engine (which frees the slots) in whichever way the request ends.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import structlog

from server.engine.types.requests import FinishReason, GenerationRequest, TokenEvent
from server.errors import ApiError, DeadlineError, InternalError, ShutdownError
from server.generation.choice import Answer, Choice, Piece, Plan
from server.generation.logprobs import check_num_entries
from server.protocol.usage import Usage
from server.service import Service
from server.states.session import StateSession

MAX_INLINE_TOKENS = 4096
MAX_UNREAD_PIECES = 100_000
"""Pieces that may wait for a client who does not read; then its request ends."""
logger = structlog.stdlib.get_logger("dijiang.answers")


class Generation:
    """All choices of one request, from admission to the last slot freed."""

    def __init__(
        self,
        service: Service,
        plans: Sequence[Plan],
        *,
        session: StateSession,
        num_prompts: int,
        timeout_s: float | None,
        counts_predicted: bool = False,
    ) -> None:
        """
        Args:
            plans: the choices, those of one prompt next to each other, as many for each.
            session: the states that they begin from and leave behind.
            num_prompts: how many prompts the choices belong to.
            timeout_s: after which the whole request ends with an error; None: never.
            counts_predicted: whether the usage says what became of guesses from a prediction.
        """
        self._service = service
        self._plans = plans
        self._session = session
        self._num_prompts = num_prompts
        self._timeout_s = timeout_s
        self._counts_predicted = counts_predicted
        self._choices = [
            Choice(index, plan, service.metrics, keeps_tokens=session.keeps) for index, plan in enumerate(plans)
        ]
        for choice, plan in zip(self._choices, plans, strict=True):
            if plan.scored_by is not None:
                self._choices[plan.scored_by].followers.append(choice)
        self._admitted = AsyncExitStack()
        self._pumps: list[asyncio.Task[None]] = []
        self._pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        self._deadline: float | None = None
        self._ends: dict[int, dict[str, Any]] = {}
        self._is_cut_off = False
        self._outputs_before: tuple[int, ...] | None = None

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        session, firsts = self._session, self._choices[:: self._num_per_prompt]
        thoughts = [choice.thought.num_tokens for choice in self._choices if choice.thought is not None]
        return Usage.of(
            prompt_tokens=self._num_new_tokens + self._num_prompts * session.num_past_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=self._num_prompts * session.num_fed_tokens + sum(c.num_cached_tokens for c in firsts),
            reasoning_tokens=sum(thoughts) if thoughts else None,
            predicted=self._predicted if self._counts_predicted else None,
        )

    @property
    def _predicted(self) -> tuple[int, int]:
        """Guesses from the prediction that were right, and wrong."""
        choices = self._choices
        return sum(c.num_predicted_right for c in choices), sum(c.num_predicted_wrong for c in choices)

    @property
    def _num_per_prompt(self) -> int:
        return len(self._plans) // self._num_prompts

    @property
    def _num_new_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(plan.request.prompt_token_ids) for plan in self._plans[:: self._num_per_prompt])

    def prompt_token_ids(self, index: int) -> tuple[int, ...]:
        """The prompt of a choice."""
        return self._plans[index].request.prompt_token_ids

    def resume(self, token_ids: Sequence[int], *, num_cached_tokens: int) -> str:
        """To be called before `start`: its one choice goes on behind tokens that it had before it was cut off.

        Args:
            token_ids: so far.
            num_cached_tokens: of its prompt, as was told then.

        Returns:
            The text of them.
        """
        (choice,) = self._choices
        self._outputs_before = tuple(token_ids)
        return choice.go_on_behind(self._outputs_before, num_cached_tokens=num_cached_tokens)

    @property
    def token_ids(self) -> list[int]:
        """Of its one choice, which keeps them."""
        (choice,) = self._choices
        assert choice.token_ids is not None
        return choice.token_ids

    async def start(self) -> None:
        """Submits every choice, or none.

        Raises:
            ApiError: the engine takes no more work now.
        """
        try:
            self._admitted.enter_context(self._service.generating())
            self._service.running.add(self)
            self._admitted.callback(self._service.running.discard, self)
            await self._admitted.enter_async_context(self._session.opened(len(self._plans)))
            for choice in self._choices:
                stack = await self._admitted.enter_async_context(AsyncExitStack())
                events = await stack.enter_async_context(self._service.engine.submit(self._request(choice)))
                stack.callback(choice.close)
                self._pumps.append(asyncio.create_task(self._pump(choice, events, stack)))
        except BaseException:
            await self.close()
            raise
        if self._outputs_before is None:
            self._service.metrics.prompt_tokens.inc(self._num_new_tokens)
        if self._timeout_s is not None:
            self._deadline = asyncio.get_running_loop().time() + self._timeout_s

    async def close(self) -> None:
        """Ends what still runs and frees its slots. May be called twice."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._admitted.aclose()

    async def suspend(self) -> None:
        """Cuts off the choices that still run, their states kept; `pieces` ends with a `ShutdownError` that tells them.

        Returns when all of that is done. Choices that are just ending end as they would have.
        """
        running = [choice for choice, pump in zip(self._choices, self._pumps, strict=False) if not pump.done()]
        saved = [choice for choice in running if self._is_worth_saving(choice)]
        for choice in running:
            if choice not in saved:  # at once, or it would get the place of one that is saved
                self._suspend(choice, save_to=None)
        async with self._session.room_to_stop(len(saved)) as files:
            for choice, file in zip(saved, files, strict=True):
                self._suspend(choice, save_to=file)
            if self._pumps:
                await asyncio.wait(self._pumps)  # which whoever gives up waiting does not end

    def _is_worth_saving(self, choice: Choice) -> bool:
        """Whether somebody can go on from where it is."""
        rescue = self._session.rescue
        if rescue is None or rescue.is_own:
            return rescue is not None
        return choice.num_received > 0 and (rescue.in_any_form or self._plans[choice.index].request.grammar is None)

    def _suspend(self, choice: Choice, *, save_to: str | None) -> None:
        rescue, request_id = self._session.rescue, self._plans[choice.index].request.request_id
        in_prompt = rescue is not None and rescue.is_own
        self._service.engine.suspend(request_id, save_to=save_to, note=self._session.note, in_prompt=in_prompt)

    async def pieces(self, *, idle_s: float | None = None) -> AsyncIterator[Piece | None]:
        """Pieces of all choices as they come, until every choice has ended.

        Args:
            idle_s: after that much silence a None comes (and may come just before the deadline's error).

        Raises:
            ApiError: a choice failed, or the deadline has passed.
        """
        num_open = len(self._choices)
        while num_open:
            piece = await self._next(idle_s)
            if piece is not None and piece.finish_reason is not None:
                num_open -= 1
            yield piece

    async def collect(self) -> list[Answer]:
        """Waits for the whole answers, by index.

        Raises:
            ApiError: a choice failed, the deadline has passed, or more log-probabilities came than are kept.
        """
        answers = [Answer() for _ in self._plans]
        texts: list[list[str]] = [[] for _ in self._plans]
        try:
            await self._collect_into(answers, texts)
        except ShutdownError as error:
            for choice in error.details["choices"]:
                choice["text"] = "".join(texts[choice["index"]])
            raise
        for answer, parts in zip(answers, texts, strict=True):
            answer.text = "".join(parts)
        return answers

    async def _collect_into(self, answers: list[Answer], texts: list[list[str]]) -> None:
        num_entries = 0
        async for piece in self.pieces():
            if piece is None:
                continue
            answer = answers[piece.index]
            texts[piece.index].append(piece.text)
            answer.token_ids += piece.token_ids
            answer.prompt += [] if piece.prompt is None else [piece.prompt]
            answer.output += [] if piece.output is None else [piece.output]
            num_entries += piece.num_entries
            check_num_entries(num_entries)
            if piece.finish_reason is not None:
                answer.finish_reason = piece.finish_reason
                answer.state_id = piece.state_id

    async def _next(self, idle_s: float | None) -> Piece | None:
        now = asyncio.get_running_loop().time()
        if self._deadline is not None and now >= self._deadline:
            raise DeadlineError(f"the answer was not complete after {self._timeout_s:g} s")
        piece = self._pieces.get_nowait() if not self._pieces.empty() else await self._wait(now, idle_s)
        if isinstance(piece, ApiError):
            raise piece
        return piece

    async def _wait(self, now: float, idle_s: float | None) -> Piece | ApiError | None:
        """The next piece; None when there was none for `idle_s`, or until the deadline."""
        silent_until = None if idle_s is None else now + idle_s
        until = min((moment for moment in (silent_until, self._deadline) if moment is not None), default=None)
        try:
            async with asyncio.timeout_at(until):
                return await self._pieces.get()
        except TimeoutError:
            return None

    async def _pump(self, choice: Choice, events: AsyncIterator[TokenEvent], stack: AsyncExitStack) -> None:
        """Carries the pieces of one choice to the queue; leaves the engine as soon as it has ended."""
        async with stack:
            try:
                await self._prepared(choice)
                async for event in events:
                    if event.finish_reason is FinishReason.SUSPENDED:
                        await self._cut_off(choice, event)
                        return
                    piece = choice.take(event)
                    for other in choice.shared(event):
                        self._pieces.put_nowait(other)
                    if event.token_ids or event.finish_reason is not None:
                        choice.prompt_is_scored.set()  # all of it has come with the first token at the latest
                    if piece.finish_reason is not None and self._session.keeps:
                        piece = replace(piece, state_id=await self._keep_state(choice, event, stack))
                    self._pieces.put_nowait(piece)
                    if self._pieces.qsize() > MAX_UNREAD_PIECES:
                        raise DeadlineError("the answer is not read as fast as it is written")
                    if piece.finish_reason is not None:
                        self._note_end(choice, piece.state_id)
                        return
            except ApiError as error:
                self._pieces.put_nowait(error)
                return
            except Exception:
                logger.exception("an answer failed")
            self._pieces.put_nowait(InternalError())

    async def _cut_off(self, choice: Choice, event: TokenEvent) -> None:
        """Keeps the state of a choice that the engine has suspended."""
        choice.prompt_is_scored.set()  # or not at all: those who wait are cut off too
        self._pieces.put_nowait(Piece(choice.index, choice.cut_off(), (), None))
        state_id: str | None = None
        if event.saved is not None:
            try:
                state_id = await self._session.keep_rescued(event.saved)
            except ApiError as error:
                logger.error("the state of an answer that was cut off could not be kept", problem=str(error))
        self._is_cut_off = True
        self._note_end(choice, state_id)

    def _note_end(self, choice: Choice, state_id: str | None) -> None:
        """After the last choice's end: if any was cut off, the whole is."""
        self._ends[choice.index] = {
            "index": choice.index,
            "state_id": state_id,
            "completion_tokens": choice.num_tokens,
        }
        if self._is_cut_off and len(self._ends) == len(self._choices):
            self._pieces.put_nowait(ShutdownError([self._ends[index] for index in sorted(self._ends)]))

    async def _prepared(self, choice: Choice) -> None:
        """Reads an echoed prompt beforehand, or waits until all of it has come from where it is scored."""
        scored_by = self._plans[choice.index].scored_by
        if scored_by is not None:
            await self._choices[scored_by].prompt_is_scored.wait()
        elif choice.text.num_unread > MAX_INLINE_TOKENS:
            await asyncio.to_thread(choice.text.read_prompt)

    def _request(self, choice: Choice) -> GenerationRequest:
        request = self._session.attach(self._plans[choice.index].request, choice.index)
        return request if self._outputs_before is None else self._session.resumed(request, self._outputs_before)

    async def _keep_state(self, choice: Choice, event: TokenEvent, stack: AsyncExitStack) -> str:
        """Keeps the state after the tokens that were taken; its id."""
        assert choice.token_ids is not None
        if event.saved is not None and choice.num_tokens == choice.num_received:
            return await self._session.keep(event.saved)
        # A stop string ended the text while the engine went on: its state has seen more than the answer says.
        await stack.aclose()
        prompt = (*self._plans[choice.index].request.prompt_token_ids, *choice.token_ids)
        saved, _ = await self._session.feed(prompt, choice.index)
        return await self._session.keep(saved)
