"""What all routes share: the engine's client, the text side of the model, limits, and whether we are open."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

from dijiang_model.errors import ConfigError
from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.template import TemplateSyntaxFailure
from server.engine.state.snapshot_files import MAX_HEADER_BYTES
from server.engine.types.requests import EngineInfo, EngineStats, GenerationRequest, Tenant, TokenEvent
from server.engine_client.candidate import EngineLoadError
from server.engine_client.submissions import OnBegun, OnEvent, TenantLoad
from server.errors import ConflictError, EngineUnavailableError, NotFoundError
from server.event_log import EventLog
from server.grammar_check.checker import GrammarChecker
from server.keys import KeyFacts, KeyLabels, by_owner
from server.metrics import Metrics
from server.options import ServiceOptions
from server.playground.renderer import Renderer
from server.rate_limits import RateLimits
from server.states.store import StateStore
from server.text.reasoning import thought_form
from server.text.template import template_of
from server.text.threads import TextThreads
from server.text.tokenizer import Tokenizer
from server.tracing import NO_TRACER, Tracer

MAX_RETRY_AFTER_S = 30
_NOTHING_KNOWN = KeyFacts(b"", "")
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """The service's side of the engine; `server.engine_client.client.EngineClient` is one."""

    @property
    def status(self) -> str: ...
    @property
    def info(self) -> EngineInfo | None: ...
    @property
    def stats(self) -> EngineStats | None: ...
    @property
    def num_restarts(self) -> int: ...
    @property
    def loads(self) -> Mapping[str, TenantLoad]: ...
    def submit(self, request: GenerationRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]: ...
    def generate(
        self, requests: Sequence[GenerationRequest], on_event: OnEvent, on_begun: OnBegun = ...
    ) -> AbstractAsyncContextManager[Callable[[str], None]]: ...
    def suspend(self, request_id: str, *, save_to: str | None, note: str, in_prompt: bool) -> None: ...
    def reset_cache(self) -> None: ...
    async def reload(self, until_idle: Callable[[], Awaitable[None]], *, beside: bool = True) -> EngineInfo: ...


class Suspendable(Protocol):
    """Something that generates and can be cut off."""

    async def suspend(self) -> None:
        """Lets it end with its state kept; returns when that is done."""
        ...


ReadAgain = Callable[[], tuple[ServiceOptions, Tokenizer | None]]


class Service:
    """State of the running service; one per application, lives on the event loop's thread.

    Attributes:
        thoughts: how the model thinks before it answers; None: it does not.
        leaving: the server is about to stop: `/ready` says so, connections are closed after their answers.
        draining: no new work is taken any more; what runs is finished.
        paused: the same, because an operator wants it for a while.
        num_active: requests that generate right now.
        running: what they are.
        is_closing: what the service has started itself is being ended.
        background: responses that are made while nobody waits, by id.
        event_logs: their events so far, by id.
        texts: where work on long texts is done.
        rate_limits: what each key has used of its minute.
        checking: held by a self-check; one at a time is enough.
        labels: what keys are called in logs and metrics.
        tracer: records where the time of requests goes.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServiceOptions,
        tokenizer: Tokenizer | None,
        *,
        states: StateStore | None = None,
        grammars: GrammarChecker | None = None,
        read_again: ReadAgain | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """
        Args:
            states: where conversations are kept; None: requests that want it are refused.
            grammars: compiles the grammars of requests; None: requests that have one are refused.
            read_again: reads names and tokenizer of the model again for `reload`; None: it is refused.
            tracer: records where the time of requests goes.

        Raises:
            TemplateSyntaxFailure: the model's chat template is not valid.
        """
        self.states = states
        self.grammars = grammars
        self.renderer = Renderer()
        self.engine = engine
        self.options = options
        self.tokenizer = tokenizer
        self.chat_template = template_of(tokenizer)
        self.thoughts = thought_form(options.reasoning_parser, tokenizer)
        self._read_again = read_again
        self.texts = TextThreads()
        self.rate_limits = RateLimits(options.rate_limit_requests, options.rate_limit_tokens)
        self._facts: Mapping[str, KeyFacts] = {}
        self.labels = KeyLabels()
        self._learn_keys()
        self.tracer = tracer
        self.metrics = Metrics(engine, self.labels.of)
        if states is not None:
            self.metrics.watch_states(states)
        self.created = int(time.time())
        self.leaving = self.draining = self.paused = False
        self.num_active = 0
        self.running: set[Suspendable] = set()
        self.is_closing = self._is_reloading = False
        self.background: dict[str, asyncio.Task[None]] = {}
        self.event_logs: dict[str, EventLog] = {}
        self.checking = asyncio.Lock()

    async def close(self) -> None:
        """Ends what the service itself has started. May be called twice."""
        self.is_closing = True
        for task in [*self.background.values()]:
            task.cancel()
        await asyncio.gather(*self.background.values(), return_exceptions=True)
        self.renderer.close()
        if self.grammars is not None:
            await self.grammars.close()
        if self.states is not None:
            await self.states.close()
        await asyncio.to_thread(self.tracer.close)

    async def suspend(self, *, timeout_s: float) -> None:
        """Cuts off what still runs and keeps its states, as far as that can be done in so many seconds."""
        running = [*self.running]
        try:
            async with asyncio.timeout(timeout_s):
                results = await asyncio.gather(*(item.suspend() for item in running), return_exceptions=True)
                if self.background:
                    await asyncio.wait(self.background.values())  # which are suspended
        except TimeoutError:
            _log.error("the states of what still ran could not all be saved within %g s", timeout_s)
            return
        for problem in results:
            if problem is not None:
                _log.error("the states of a request that still ran could not be saved", exc_info=problem)

    def end_background(self, response_id: str) -> None:
        """Ends a response that is made in the background; nothing happens if there is none."""
        if (task := self.background.get(response_id)) is not None:
            task.cancel()

    @property
    def status(self) -> str:
        """`ok`, `draining`, or the engine's own word: `loading`, `restarting`, `failed`, `stopped`."""
        engine_status = str(self.engine.status)
        if engine_status != "ready":
            return engine_status
        return "draining" if self.draining or self.paused else "ok"

    @property
    def retry_after_s(self) -> int:
        """When to try again while no requests are taken: as set, and not before the engine can be there again."""
        wanted, info = self.options.retry_after_s, self.engine.info
        if info is None or self.engine.status == "ready":
            return wanted
        return max(wanted, min(math.ceil(info.load_s), MAX_RETRY_AFTER_S))

    def admit(self, owner: str, model: str | None) -> EngineInfo:
        """Admits an owner's request that will make the engine work, and counts it; `model`: that it names, if any.

        Raises:
            NotFoundError: there is no such model.
            EngineUnavailableError: loading, restarting, draining or failed.
            RateLimitError: the owner has used up its minute.
        """
        self.require_model(model)
        info = self.require_open()
        self.rate_limits.admit(owner)
        return info

    def tenant_of(self, owner: str) -> Tenant:
        """What the engine is told of the owner of a request."""
        options, facts = self.options, self._facts.get(owner, _NOTHING_KNOWN)
        return Tenant(
            owner,
            weight=facts.weight,
            max_running=_given(facts.max_running, options.max_running_per_key),
            max_waiting=_given(facts.max_queue, options.max_queue_per_key),
            max_waiting_tokens=_given(facts.max_queue_tokens, options.max_queue_tokens_per_key),
            outranks=_given(facts.priority_across_keys, options.priority_across_keys),
        )

    def change_keys(
        self, *, key_hashes: frozenset[bytes], admin_key_hashes: frozenset[bytes], keys: tuple[KeyFacts, ...]
    ) -> None:
        """Lets other keys in from now on; what runs is not ended."""
        self.options = replace(self.options, key_hashes=key_hashes, admin_key_hashes=admin_key_hashes, keys=keys)
        self._learn_keys()

    def _learn_keys(self) -> None:
        self._facts = by_owner(self.options.keys)
        self.labels.learn(self._facts)
        self.rate_limits.change_own(
            {name: (one.rate_limit_requests, one.rate_limit_tokens) for name, one in self._facts.items()}
        )

    def require_open(self) -> EngineInfo:
        """The loaded engine's facts.

        Raises:
            EngineUnavailableError: loading, restarting, draining or failed.
        """
        status = self.status
        if self.draining or self.paused:
            reason = "the server is shutting down" if self.draining else "the server takes no requests for a while"
            raise EngineUnavailableError(reason, code="draining", retry_after_s=self.retry_after_s)
        if status != "ok" or self.engine.info is None:
            raise EngineUnavailableError(
                f"the engine is not ready: {status}", code=f"engine_{status}", retry_after_s=self.retry_after_s
            )
        return self.engine.info

    def require_model(self, name: str | None) -> None:
        """Raises `NotFoundError` for any name but those of the served model; an empty one is none."""
        if name and name != self.options.model_name and name not in self.options.other_names:
            raise NotFoundError(
                f"the model {name[:100]!r} does not exist here; this server has {self.options.model_name!r}",
                param="model",
                code="model_not_found",
            )

    @property
    def max_state_file_bytes(self) -> int:
        """The largest file that can be a state of this model; as of any body until the model is loaded."""
        info = self.engine.info
        if info is None or info.state_layout is None:
            return self.options.max_body_bytes
        return info.state_layout.num_data_bytes + MAX_HEADER_BYTES

    async def reload(self, until_idle: Callable[[], Awaitable[None]], *, beside: bool = True) -> None:
        """Loads the model, its tokenizer and its chat template again, as they are on the disk now.

        Args:
            until_idle: awaited before the change; what still runs after it ends with an error.
            beside: load beside the model that serves, which goes on serving if this one cannot be loaded.

        Raises:
            ConflictError: the model cannot be used; nothing has changed.
            EngineUnavailableError: the engine is not loaded, or (not `beside`) cannot be loaded any more.
        """
        if self._is_reloading:
            raise ConflictError("the model is being loaded already", code="reload_failed")
        self._is_reloading = True
        try:
            await self._reload(until_idle, beside=beside)
        finally:
            self._is_reloading = False

    async def _reload(self, until_idle: Callable[[], Awaitable[None]], *, beside: bool) -> None:
        if self._read_again is None:
            raise ConflictError("this server cannot load its model again", code="reload_failed")
        try:
            options, tokenizer = await asyncio.to_thread(self._read_again)
            template = template_of(tokenizer)
        except (ConfigError, UnsupportedTokenizerError, TemplateSyntaxFailure, OSError) as error:
            raise ConflictError(f"the model cannot be used: {error}", code="reload_failed") from error
        if (tokenizer is None) != (self.tokenizer is None):
            raise ConflictError(
                "the model has a tokenizer now and had none, or the other way round: start the server again",
                code="reload_failed",
            )
        try:
            await self.engine.reload(until_idle, beside=beside)
        except EngineLoadError as error:
            _log.error("the model could not be loaded again: %s", error)
            message = f"the model cannot be loaded; the loaded one keeps serving: {error}"
            raise ConflictError(message, code="reload_failed") from error
        self.options, self.tokenizer, self.chat_template = options, tokenizer, template
        self._learn_keys()
        self.thoughts = thought_form(options.reasoning_parser, tokenizer)
        if self.grammars is not None:
            await self.grammars.reset()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Counts a request as active while it generates, so that a drain waits for it."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
