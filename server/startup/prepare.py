"""What a service is made of, and how it starts and ends, whoever brings it the requests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from dijiang_model.errors import ConfigError
from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.template import TemplateSyntaxFailure
from server.engine.types.requests import EngineConfig
from server.engine_client.client import EngineClient
from server.grammar_check.checker import GrammarChecker
from server.hardware import HardwareError, find_device
from server.service import Service, ServiceOptions
from server.startup.assemble import (
    engine_config,
    find_model,
    grammar_limits,
    make_tracer,
    open_store,
    service_options,
)
from server.startup.errors import StartError
from server.startup.notices import Notices
from server.startup.settings import Settings
from server.states.errors import StoreError
from server.states.store import StateStore
from server.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is settled before the engine starts."""

    settings: Settings
    model: Path
    default_name: str
    config: EngineConfig
    engine: EngineClient
    store: StateStore | None

    def make_service(self) -> tuple[Service, Tokenizer | None]:
        """Imports the application and reads the tokenizer: a second's work that the engine need not wait for.

        Raises:
            StartError: the tokenizer, the chat template, the keys or the tracer cannot be used.
        """
        import_module("server.app")
        import_module("server.http.connections")
        try:
            tokenizer = load_tokenizer(self.model)
            grammars = None if tokenizer is None else GrammarChecker(self.model, grammar_limits(self.settings))
            service = Service(
                self.engine,
                self._options(),
                tokenizer,
                states=self.store,
                grammars=grammars,
                read_again=self._read,
                tracer=make_tracer(self.settings),
            )
        except (ConfigError, UnsupportedTokenizerError, TemplateSyntaxFailure) as error:
            raise StartError(str(error)) from error
        if tokenizer is None and self.settings.reasoning_parser == "think":
            raise StartError("reasoning_parser think has no effect: the model has no tokenizer")
        return service, tokenizer

    def _options(self) -> ServiceOptions:
        return service_options(self.settings, self.model, self.default_name)

    def _read(self) -> tuple[ServiceOptions, Tokenizer | None]:
        return self._options(), load_tokenizer(self.model)


def prepare(settings: Settings, notices: Notices) -> Prepared:
    """Finds the model and the device, and opens the store.

    Raises:
        StartError: one of them cannot be used.
    """
    model, default_name = find_model(settings, notices)
    try:
        device = find_device(settings.device, num_ranks=settings.tensor_parallel)
        store = open_store(settings, default_name, notices)
        config = engine_config(settings, model, device, store)
    except (HardwareError, StoreError) as error:
        raise StartError(str(error)) from error
    return Prepared(settings, model, default_name, config, EngineClient(config), store)


@asynccontextmanager
async def started(prepared: Prepared) -> AsyncIterator[tuple[Service, Tokenizer | None]]:
    """A service whose engine is loading; all is ended when the context is left.

    Raises:
        StartError: see `Prepared.make_service`.
    """
    engine = prepared.engine
    await engine.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        service, tokenizer = await asyncio.to_thread(prepared.make_service)
        stack.push_async_callback(service.close)
        claiming = asyncio.create_task(_claim(service))
        if service.states is not None:
            await service.states.start(service.end_background)
        try:
            yield service, tokenizer
        finally:
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            await engine.close()  # before the service, which keeps what the engine still writes


async def _claim(service: Service) -> None:
    from server.responses.background import claim_forever  # by now the application was imported

    await claim_forever(service)
