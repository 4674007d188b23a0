"""How a service starts and ends, whoever brings it the requests: the engine first, then all else beside it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from server.startup.prepare import Prepared

if TYPE_CHECKING:
    from server.service import Service
    from server.text.tokenizer import Tokenizer


@asynccontextmanager
async def started(prepared: Prepared) -> AsyncIterator[tuple["Service", "Tokenizer | None"]]:
    """A service whose engine is loading; all is ended when the context is left.

    Raises:
        StartError: see `make_service`.
    """
    engine = prepared.engine
    await engine.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        service, tokenizer = await asyncio.to_thread(_make, prepared)
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


def _make(prepared: Prepared) -> tuple["Service", "Tokenizer | None"]:
    # Imported on this thread, with the application and whatever serves it: nothing of it is needed before.
    import server.app
    import server.startup.front  # noqa: F401
    from server.startup.make_service import make_service

    return make_service(prepared)


async def _claim(service: "Service") -> None:
    from server.responses.background import claim_forever  # by now the application was imported

    await claim_forever(service)
