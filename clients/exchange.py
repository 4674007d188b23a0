"""When a request is sent again, and after how long: the rules of the official OpenAI client.

`exchange` is a generator that does no input or output: it yields what to do next (send this request,
wait so many seconds) and is sent what came of it. The two clients only carry out its steps.
"""

import email.utils
import math
import random
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import httpx

from clients.errors import APIConnectionError, APITimeoutError, status_error

DEFAULT_MAX_RETRIES = 2
INITIAL_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_SERVER_DELAY_S = 120.0
"""A server that asks for a longer pause than this is not waited for."""

Step = httpx.Request | float
"""Send this, or wait so many seconds."""
Outcome = httpx.Response | httpx.TransportError | None
"""An answer (read, if it is an error), how sending failed, or nothing after a wait."""


def exchange(request: httpx.Request, *, max_retries: int) -> Generator[Step, Outcome, httpx.Response]:
    """Sends a request, again if that may help, and returns an answer whose status is below 400.

    Raises:
        APIStatusError: the last answer was an error.
        APIConnectionError: there was no answer.
    """
    for attempt in range(max_retries + 1):
        outcome = yield request
        response = outcome if isinstance(outcome, httpx.Response) else None
        if response is not None and not response.is_error:
            return response
        if attempt == max_retries or (response is not None and not should_retry(response)):
            break
        yield retry_delay_s(attempt, response)
    if response is not None:
        raise status_error(response)
    assert isinstance(outcome, httpx.TransportError)
    raise connection_error(outcome) from outcome


def should_retry(response: httpx.Response) -> bool:
    """Whether an error answer may be followed by a better one."""
    asked_s = _server_delay_s(response)
    if asked_s is not None and asked_s > MAX_SERVER_DELAY_S:
        return False
    match response.headers.get("x-should-retry"):
        case "true":
            return True
        case "false":
            return False
        case _:
            return response.status_code in (408, 409, 429) or response.status_code >= 500


def retry_delay_s(attempt: int, response: httpx.Response | None) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 0): what the server asks for, else a backoff."""
    asked_s = None if response is None else _server_delay_s(response)
    if asked_s is not None and 0 < asked_s <= MAX_SERVER_DELAY_S:
        return asked_s
    # The exponent is bounded only to keep the power finite.
    backoff_s = min(INITIAL_DELAY_S * 2.0 ** min(attempt, 1000), MAX_DELAY_S)
    return backoff_s * (1 - 0.25 * random.random())  # noqa: S311  (spreads clients, hides nothing)


def connection_error(error: httpx.TransportError) -> APIConnectionError:
    """The client's own error for one of httpx's, with the address in it."""
    url = error.request.url
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(f"no answer in time from {url} ({type(error).__name__})")
    details = str(error)
    return APIConnectionError(f"no answer from {url}: {details if details != '' else type(error).__name__}")


@contextmanager
def translated_transport_errors() -> Iterator[None]:
    """Turns httpx's errors while a body is read into the client's own."""
    try:
        yield
    except httpx.TransportError as error:
        raise connection_error(error) from error


def _server_delay_s(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; None if it does not say so intelligibly."""
    for header, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = response.headers.get(header)
        if value is None:
            continue
        try:
            delay_s = float(value) * unit_s
        except ValueError:
            continue
        return delay_s if math.isfinite(delay_s) else None
    return _delay_until_s(response.headers.get("retry-after"))


def _delay_until_s(date: str | None) -> float | None:
    """Seconds from now to an HTTP date."""
    parsed = None if date is None else email.utils.parsedate_tz(date)
    if parsed is None:
        return None
    try:
        return email.utils.mktime_tz(parsed) - time.time()
    except (ValueError, OverflowError):
        return None
