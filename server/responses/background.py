"""Responses that are made while nobody waits, and those among them whose server was stopped, or is gone."""

import asyncio

import structlog

from server.errors import ServiceError, UnavailableError
from server.generation.sessions import check_fingerprint
from server.generation.streaming import charged_tokens
from server.http.errors import on_wire
from server.keys import EVERYBODY
from server.protocol.bodies import parse_body
from server.protocol.responses import ResponseRequest
from server.responses.plan import plan_resumed
from server.responses.run import ResponseRun
from server.responses.suspended import Unfinished
from server.service import Service
from server.states.store import ResponseRecord

POLL_S = 2.0
MAX_AT_ONCE = 4
"""Responses that one server takes up at a time, so that replicas share them."""
logger = structlog.stdlib.get_logger("dijiang.responses")


def make_in_background(service: Service, run: ResponseRun) -> None:
    """Begins to make a response whose generation was started."""
    task = asyncio.create_task(_made(service, run))
    service.background[run.id] = task
    service.event_logs[run.id] = run.log
    task.add_done_callback(lambda _: _forget(service, run))


async def claim_forever(service: Service) -> None:
    """Goes on with responses that were suspended, here or at another replica, for as long as work is taken."""
    while True:
        try:
            while service.status == "ok" and not service.leaving and await _claim_some(service) == MAX_AT_ONCE:
                pass
        except UnavailableError:
            pass  # said already; the next time comes
        except Exception:
            logger.exception("suspended responses could not be resumed")
        await asyncio.sleep(POLL_S)


async def _claim_some(service: Service) -> int:
    if service.states is None:
        return 0
    info = service.engine.info
    if info is None or info.state_layout is None:
        return 0
    records = await service.states.claim_responses(MAX_AT_ONCE, fingerprint=info.state_layout.fingerprint)
    return sum([await _claim(service, record) for record in records])


async def _claim(service: Service, record: ResponseRecord) -> bool:
    """Whether it goes on."""
    source = Unfinished.of(record.body).source
    try:
        body = parse_body(source.encode(), ResponseRequest)
        run = ResponseRun(
            service, body, owner=record.owner, store=service.states, ttl_s=record.ttl_s, source=source, before=record
        )
        info, before = service.require_open(), run.unfinished
        for snapshot in (run.snapshot, before.base):
            if snapshot is not None:
                check_fingerprint(snapshot, info)
        generation = await plan_resumed(service, info, body, run)
        run.resume()
        await generation.start()
    except ServiceError as error:
        await _not_claimed(service, record, error)
        return False
    logger.info("a background response is resumed", id=run.id, num_tokens=len(before.token_ids))
    make_in_background(service, run)
    return True


async def _not_claimed(service: Service, record: ResponseRecord, error: ServiceError) -> None:
    """It waits on for better times, or fails if there will be none."""
    assert service.states is not None
    if isinstance(error, UnavailableError):
        await service.states.put_response(record.suspended())
        return
    logger.error("a background response cannot be resumed", id=record.id, problem=str(error))
    await service.states.put_response(record.failed(code=on_wire(error).code, message=error.message))


async def _made(service: Service, run: ResponseRun) -> None:
    try:
        await run.in_background()
    finally:
        service.rate_limits.charge(run.owner, charged_tokens(run.generation.usage))
        key = {} if run.owner == EVERYBODY else {"key": service.labels.of(run.owner)}
        logger.info("background response", id=run.id, **key, **run.generation.log_facts)


def _forget(service: Service, run: ResponseRun) -> None:
    """The response has ended, or goes on elsewhere: from now on it is told from the store."""
    service.background.pop(run.id, None)
    service.event_logs.pop(run.id, None)
