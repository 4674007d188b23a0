"""What all routes share: the engine's client, the text side of the model, limits, and whether we are open.

`ServiceOptions` is the frozen part of the settings that the HTTP side gets; only the composition root
(`server.serve`) makes one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from server.engine.snapshot_files import MAX_HEADER_BYTES
from server.engine.types import EngineInfo, EngineStats, GenerationRequest, TokenEvent
from server.errors import EngineUnavailableError, NotFoundError
from server.metrics import Metrics
from server.states.store import StateStore
from server.structure.checker import GrammarChecker
from server.text.template import ChatTemplate
from server.text.tokenizer import Tokenizer


class Engine(Protocol):
    """The service's side of the engine; `server.engine_client.EngineClient` is one."""

    @property
    def status(self) -> str: ...
    @property
    def info(self) -> EngineInfo | None: ...
    @property
    def stats(self) -> EngineStats | None: ...
    @property
    def num_restarts(self) -> int: ...
    def submit(self, request: GenerationRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]: ...


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Limits and names of the HTTP side; 0 means none where a limit can be off.

    Attributes:
        model_name: the name clients ask for.
        version: of this server.
        fingerprint: `system_fingerprint` of answers.
        max_prompt_tokens: longest prompt in tokens; 0: no limit.
        max_n: most answers per prompt.
        max_prompts: most prompts in one request.
        max_choices: most answers in one request (prompts times `n`).
        max_stop: most stop strings.
        max_body_bytes: largest request body.
        body_timeout_s: longest time for a body to arrive.
        request_timeout_s: longest time for an answer; 0: no limit.
        keepalive_s: silence in a stream after which a comment is sent.
        key_hashes: SHA-256 of the keys that are let in; empty: everybody is.
        metrics_need_key: whether `/metrics` asks for a key too.
        cors_origins: web origins that may call; empty: none.
        state_ttl_s: how long states and responses live without being used, unless a request says; 0: for ever.
    """

    model_name: str
    version: str = "0"
    fingerprint: str = "fp_0"
    max_prompt_tokens: int = 0
    max_n: int = 16
    max_prompts: int = 128
    max_choices: int = 128
    max_stop: int = 16
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 60.0
    request_timeout_s: float = 0.0
    keepalive_s: float = 15.0
    key_hashes: frozenset[bytes] = frozenset()
    metrics_need_key: bool = False
    cors_origins: tuple[str, ...] = ()
    state_ttl_s: float = 0.0


class Service:
    """State of the running service; one per application, lives on the event loop's thread.

    Attributes:
        draining: no new work is taken; what runs is finished.
        num_active: requests that generate right now.
        background: responses that are made while nobody waits, by id.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServiceOptions,
        tokenizer: Tokenizer | None,
        *,
        states: StateStore | None = None,
        grammars: GrammarChecker | None = None,
    ) -> None:
        """
        Args:
            states: where conversations are kept; None: requests that want it are refused.
            grammars: compiles the grammars of requests; None: requests that have one are refused.

        Raises:
            TemplateSyntaxFailure: the model's chat template is not valid.
        """
        self.states = states
        self.grammars = grammars
        self.engine = engine
        self.options = options
        self.tokenizer = tokenizer
        has_template = tokenizer is not None and tokenizer.chat_template is not None
        self.chat_template = ChatTemplate(tokenizer) if has_template and tokenizer is not None else None
        self.metrics = Metrics(engine)
        if states is not None:
            self.metrics.watch_states(states)
        self.created = int(time.time())
        self.draining = False
        self.num_active = 0
        self.background: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Ends what the service itself has started. May be called twice."""
        for task in [*self.background.values()]:
            task.cancel()
        await asyncio.gather(*self.background.values(), return_exceptions=True)
        if self.grammars is not None:
            await self.grammars.close()
        if self.states is not None:
            await self.states.close()

    @property
    def status(self) -> str:
        """`ok`, `draining`, or the engine's own word: `loading`, `restarting`, `failed`, `stopped`."""
        engine_status = str(self.engine.status)
        if engine_status != "ready":
            return engine_status
        return "draining" if self.draining else "ok"

    def require_open(self) -> EngineInfo:
        """The loaded engine's facts.

        Raises:
            EngineUnavailableError: loading, restarting, draining or failed.
        """
        status = self.status
        if self.draining:
            raise EngineUnavailableError("the server is shutting down", code="draining", retry_after_s=5)
        if status != "ok" or self.engine.info is None:
            raise EngineUnavailableError(f"the engine is not ready: {status}", code=f"engine_{status}")
        return self.engine.info

    def require_model(self, name: str | None) -> None:
        """Raises `NotFoundError` for any name but that of the served model."""
        if name is not None and name != self.options.model_name:
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

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Counts a request as active while it generates, so that a drain waits for it."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1
