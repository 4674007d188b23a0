"""The answers of one request while they grow: submitted before the first byte is answered, merged in one queue.

The engine's events become text as they come, without a task of their own; `deltas` hands out what is in the queue. The
engine is left (which frees the slots) in whichever way the request ends.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import structlog

from server.engine.types.requests import FinishReason, GenerationRequest, TokenEvent
from server.errors import DeadlineError, InternalError, ServiceError, ShutdownError
from server.generation.choice import Answer, Choice, TextDelta
from server.generation.logprobs import check_num_entries
from server.generation.measures import Measures, log_facts
from server.generation.planning import RequestPlan
from server.protocol.usage import Usage
from server.service import Service
from server.states.errors import StorageFullError, StoreUnavailableError
from server.states.session import error_of
from server.tracing import current

MAX_INLINE_TOKENS = 4096
MAX_UNREAD_DELTAS = 100_000
"""Deltas that may wait for a client who does not read; then its request ends."""
logger = structlog.stdlib.get_logger("dijiang.answers")


class Generation:
    """All choices of one request, from admission to the last slot freed.

    Attributes:
        error_code: what ended it, if an error did, as the client was told.
    """

    def __init__(self, service: Service, plan: RequestPlan) -> None:
        self.plan = plan
        self._service = service
        self._session = plan.session
        self._trace = current()
        self._tenant = service.labels.of(plan.owner)
        self._measures = [Measures(service.metrics, self._trace, self._tenant, request) for request in plan.requests]
        self._choices = [Choice(index, plan, measures) for index, measures in enumerate(self._measures)]
        self._by_request = {
            request.request_id: choice for request, choice in zip(plan.requests, self._choices, strict=True)
        }
        for choice in self._choices:
            if choice.is_follower:
                self._leader(choice).followers.append(choice)
        self._admitted = AsyncExitStack()
        self._abort: Callable[[str], None] = lambda request_id: None
        self._deltas: asyncio.Queue[TextDelta | ServiceError] = asyncio.Queue()
        self._endings: set[asyncio.Task[None]] = set()
        self._all_ended = asyncio.Event()
        self._ends: dict[int, dict[str, Any]] = {}
        self._is_cut_off = False
        self._num_handed_out = 0
        self._num_left = len(self._choices)
        self._outputs_before: tuple[int, ...] | None = None
        self.error_code: str | None = None

    @property
    def usage(self) -> Usage:
        """Token counts so far, of all that was generated."""
        return self._usage(sum(choice.num_tokens for choice in self._choices))

    @property
    def usage_handed_out(self) -> Usage:
        """Token counts so far, of the deltas that were handed out."""
        return self._usage(self._num_handed_out)

    def _usage(self, num_tokens: int) -> Usage:
        plan, session = self.plan, self._session
        thoughts = [choice.thought.num_tokens for choice in self._choices if choice.thought is not None]
        predicted = (
            sum(choice.num_predicted_right for choice in self._choices),
            sum(choice.num_predicted_wrong for choice in self._choices),
        )
        firsts = self._choices[:: plan.num_per_prompt]
        return Usage.of(
            prompt_tokens=self._num_new_tokens + plan.num_prompts * session.num_past_tokens,
            completion_tokens=num_tokens,
            cached_tokens=plan.num_prompts * session.num_fed_tokens + sum(c.num_cached_tokens for c in firsts),
            reasoning_tokens=min(sum(thoughts), num_tokens) if thoughts else None,
            predicted=predicted if plan.counts_predicted else None,
        )

    @property
    def _num_new_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(request.prompt_token_ids) for request in self.plan.requests[:: self.plan.num_per_prompt])

    @property
    def log_facts(self) -> dict[str, object]:
        """What the request's log line says of it."""
        usage, facts = self.usage, log_facts(self._measures, self.error_code)
        facts["model"] = self.plan.fields.model or self._service.options.model_name
        return facts | {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}

    def prompt_token_ids(self, index: int) -> tuple[int, ...]:
        """The prompt of a choice."""
        return self.plan.requests[index].prompt_token_ids

    def resume(self, token_ids: Sequence[int], *, num_cached_tokens: int) -> str:
        """To be called before `start`: its one choice goes on behind tokens that it had before it was cut off.

        Args:
            token_ids: so far.
            num_cached_tokens: of its prompt, as was told then.

        Returns:
            The text of them.
        """
        self._outputs_before = tuple(token_ids)
        (choice,) = self._choices
        return choice.resume(self._outputs_before, num_cached_tokens=num_cached_tokens)

    @property
    def token_ids(self) -> Sequence[int]:
        """What its one choice has generated so far; of a session that keeps states."""
        (choice,) = self._choices
        assert choice.token_ids is not None
        return choice.token_ids

    async def start(self) -> None:
        """Submits every choice, or none.

        Raises:
            ServiceError: the engine takes no more work now.
        """
        plan, enter = self.plan, self._admitted.enter_async_context
        try:
            self._admitted.enter_context(self._service.generating())
            self._service.running.add(self)
            self._admitted.callback(self._service.running.discard, self)
            async with plan.deadline.kept():
                with self._trace.measured("store", operation="open"):
                    await enter(self._session.opened(len(plan.requests)))
                for choice in self._choices:
                    if choice.num_unread > MAX_INLINE_TOKENS:
                        await asyncio.to_thread(choice.read_prompt)
            requests = [self._session.attach(request, number) for number, request in enumerate(plan.requests)]
            if self._outputs_before is not None:
                requests = [self._session.resumed(request, self._outputs_before) for request in requests]
            self._abort = await enter(self._service.engine.generate(requests, self._receive, self._begun))
            self._admitted.callback(self._end_all)
        except BaseException:
            await self.close()
            raise
        if self._outputs_before is None:
            self._service.metrics.prompt_tokens.inc(self._num_new_tokens)
            self._service.metrics.tenant_prompt_tokens.labels(self._tenant).inc(self._num_new_tokens)

    async def close(self) -> None:
        """Ends what still runs and frees its slots. May be called twice."""
        for task in self._endings:
            task.cancel()
        await asyncio.gather(*self._endings, return_exceptions=True)
        await self._admitted.aclose()
        self._all_ended.set()

    async def suspend(self) -> None:
        """Cuts off the choices that still run, their states kept; `deltas` ends with a `ShutdownError` that tells them.

        Returns when all of that is done. Choices that are just ending end as they would have.
        """
        running = [choice for choice in self._choices if not choice.has_ended]
        saved = [choice for choice in running if self._is_worth_saving(choice)]
        for choice in running:
            if choice not in saved:  # at once, or it would get the place of one that is saved
                self._suspend(choice, save_to=None)
        async with self._session.room_to_stop(len(saved)) as files:
            for choice, file in zip(saved, files, strict=True):
                self._suspend(choice, save_to=file)
            await self._all_ended.wait()

    def _is_worth_saving(self, choice: Choice) -> bool:
        """Whether somebody can go on from where it is."""
        rescue = self._session.rescue
        if rescue is None or rescue.is_own:
            return rescue is not None
        return choice.num_received > 0 and (rescue.in_any_form or self._request(choice).grammar is None)

    def _suspend(self, choice: Choice, *, save_to: str | None) -> None:
        rescue, request_id = self._session.rescue, self._request(choice).request_id
        in_prompt = rescue is not None and rescue.is_own
        self._service.engine.suspend(request_id, save_to=save_to, note=self._session.note, in_prompt=in_prompt)

    async def deltas(self, *, idle_s: float | None = None) -> AsyncGenerator[TextDelta | None, None]:
        """Deltas of all choices as they come, until every choice has ended.

        Args:
            idle_s: after that much silence a None comes (and may come just before the deadline's error).

        Raises:
            ServiceError: a choice failed, or the deadline has passed.
        """
        num_open, loop = len(self._choices), asyncio.get_running_loop()
        while num_open:
            now = loop.time()
            self.plan.deadline.check()
            delta = await self._wait(now, idle_s) if self._deltas.empty() else self._deltas.get_nowait()
            if isinstance(delta, ServiceError):
                raise delta
            if delta is not None and delta.finish_reason is not None:
                num_open -= 1
            self._num_handed_out += 0 if delta is None else len(delta.token_ids)
            yield delta

    async def collect(self) -> list[Answer]:
        """Waits for the whole answers, by index.

        Raises:
            ServiceError: a choice failed, the deadline has passed, or more log-probabilities came than are kept.
        """
        answers = [Answer() for _ in self._choices]
        texts: list[list[str]] = [[] for _ in self._choices]
        try:
            await self._collect_into(answers, texts)
        except ShutdownError as error:
            for choice in error.choices:
                choice["text"] = "".join(texts[choice["index"]])
            raise
        for answer, parts in zip(answers, texts, strict=True):
            answer.text = "".join(parts)
        return answers

    async def _collect_into(self, answers: list[Answer], texts: list[list[str]]) -> None:
        num_entries = 0
        async for delta in self.deltas():
            if delta is None:
                continue
            answer = answers[delta.index]
            texts[delta.index].append(delta.text)
            answer.token_ids += delta.token_ids
            answer.prompt += [] if delta.prompt is None else [delta.prompt]
            answer.output += [] if delta.output is None else [delta.output]
            num_entries += delta.num_entries
            check_num_entries(num_entries)
            if delta.finish_reason is not None:
                answer.finish_reason = delta.finish_reason
                answer.state_id, answer.state_error = delta.state_id, delta.state_error
                answer.stop = delta.stop

    async def _wait(self, now: float, idle_s: float | None) -> TextDelta | ServiceError | None:
        """The next delta; None when there was none for `idle_s`, or until the deadline."""
        silent_until = None if idle_s is None else now + idle_s
        until = min((moment for moment in (silent_until, self.plan.deadline.at) if moment is not None), default=None)
        try:
            async with asyncio.timeout_at(until):
                return await self._deltas.get()
        except TimeoutError:
            return None

    def _begun(self, request_id: str) -> None:
        self._by_request[request_id].measures.begun()

    def _receive(self, event: TokenEvent) -> None:
        """Takes an event of any choice; what goes wrong with it is in the queue."""
        choice = self._by_request[event.request_id]
        if choice.has_ended:
            return
        if choice.is_follower and not self._leader(choice).prompt_is_scored:
            choice.deferred.append(event)
            return
        is_suspended = event.finish_reason is FinishReason.SUSPENDED
        try:
            delta = TextDelta(choice.index, choice.cut_off(), (), None) if is_suspended else choice.take(event)
            if choice.followers and not choice.prompt_is_scored:
                self._share_prompt(choice, event)
            if delta.finish_reason is not None or is_suspended:
                self._end(choice, event, delta)
                return
            self._deltas.put_nowait(delta)
            if self._deltas.qsize() > MAX_UNREAD_DELTAS:
                raise DeadlineError("the answer is not read as fast as it is written")
        except ServiceError as error:
            self._fail(choice, error)
        except Exception:
            logger.exception("an answer failed")
            self._fail(choice, InternalError())

    def _share_prompt(self, leader: Choice, event: TokenEvent) -> None:
        """Gives the followers their log-probabilities of the prompt, and what had to wait for them."""
        shared = TokenEvent(event.request_id, prompt_logprobs=event.prompt_logprobs)
        for follower in leader.followers if event.prompt_logprobs is not None else ():
            self._deltas.put_nowait(follower.take(shared))
        # All of them have come with the first token at the latest; or not at all, where the rest is cut off too.
        leader.prompt_is_scored = bool(event.token_ids) or event.finish_reason is not None
        for follower in leader.followers if leader.prompt_is_scored else ():
            deferred, follower.deferred = follower.deferred, []
            for late in deferred:
                self._receive(late)

    def _end(self, choice: Choice, event: TokenEvent, delta: TextDelta) -> None:
        """The end of a choice; where its state is kept, a task sees to that first."""
        choice.end()
        is_suspended = event.finish_reason is FinishReason.SUSPENDED
        if is_suspended:
            self._deltas.put_nowait(delta)
        if event.finish_reason is None:  # a stop string ended the text while the engine goes on
            self._abort(event.request_id)
        if is_suspended and event.saved is not None:
            self._finish(choice, self._cut_off(choice, event))
        elif not is_suspended and self._session.keeps:
            self._finish(choice, self._kept(choice, event, delta))
        else:
            self._note_end(choice, None if is_suspended else delta, is_suspended=is_suspended)

    def _finish(self, choice: Choice, work: Coroutine[Any, Any, None]) -> None:
        async def finished() -> None:
            try:
                await work
            except ServiceError as error:
                self._fail(choice, error)
            except Exception:
                logger.exception("an answer failed")
                self._fail(choice, InternalError())

        task = asyncio.create_task(finished())
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _kept(self, choice: Choice, event: TokenEvent, delta: TextDelta) -> None:
        """Keeps the state after the tokens that were taken; an answer is worth something without it, too."""
        error: ServiceError | None = None if event.save_error is None else error_of(event.save_error)
        if error is None:
            try:
                with self._trace.measured("store", operation="keep"):
                    delta = replace(delta, state_id=await self._keep(choice, event))
            except (StoreUnavailableError, StorageFullError) as problem:
                error = problem
        if error is not None:
            logger.error("the state of an answer could not be kept", problem=str(error))
            delta = replace(delta, state_error=error)
        self._note_end(choice, delta)

    async def _keep(self, choice: Choice, event: TokenEvent) -> str:
        assert choice.token_ids is not None
        if event.saved is not None and choice.num_tokens == choice.num_received:
            saved = event.saved
        else:  # the engine's state has seen more than the answer says
            prompt = (*self._request(choice).prompt_token_ids, *choice.token_ids)
            saved, _ = await self._session.feed(prompt, choice.index)
        return await self._session.keep(saved)

    async def _cut_off(self, choice: Choice, event: TokenEvent) -> None:
        """Keeps the state of a choice that the engine has suspended."""
        assert event.saved is not None
        state_id: str | None = None
        try:
            with self._trace.measured("store", operation="rescue"):
                state_id = await self._session.keep_rescued(event.saved)
        except ServiceError as error:
            logger.error("the state of an answer that was cut off could not be kept", problem=str(error))
        self._note_end(choice, None, state_id=state_id, is_suspended=True)

    def _note_end(
        self, choice: Choice, delta: TextDelta | None, *, state_id: str | None = None, is_suspended: bool = False
    ) -> None:
        """After the last choice's end: if any was cut off, the whole is."""
        if delta is not None:
            self._deltas.put_nowait(delta)
            state_id = delta.state_id
        self._is_cut_off |= is_suspended
        num_tokens = choice.num_tokens
        self._ends[choice.index] = {"index": choice.index, "state_id": state_id, "completion_tokens": num_tokens}
        if len(self._ends) == len(self._choices) and self._is_cut_off:
            self._deltas.put_nowait(ShutdownError([self._ends[index] for index in sorted(self._ends)]))
        self._count_down()

    def _fail(self, choice: Choice, error: ServiceError) -> None:
        """The whole request fails with a choice."""
        choice.end()
        self._abort(self._request(choice).request_id)
        self._deltas.put_nowait(error)
        self._count_down()

    def _count_down(self) -> None:
        self._num_left -= 1
        if self._num_left == 0:
            self._all_ended.set()

    def _end_all(self) -> None:
        for choice in self._choices:
            choice.end()

    def _leader(self, choice: Choice) -> Choice:
        """The choice of the same prompt that scores it for all."""
        return self._choices[choice.index - choice.index % self.plan.num_per_prompt]

    def _request(self, choice: Choice) -> GenerationRequest:
        return self.plan.requests[choice.index]
