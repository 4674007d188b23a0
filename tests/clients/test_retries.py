"""Failed requests are sent again exactly when the official client would, and errors arrive typed."""

import email.utils
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from clients import errors
from clients.client import Client
from clients.exchange import MAX_DELAY_S, retry_delay_s, should_retry
from tests.clients import answers
from tests.clients.drivers import Driver
from tests.clients.loopback import Exchange, loopback_server
from tests.waiting import until

Connect = Callable[..., Driver]
STATUS_ERRORS = [
    (400, errors.BadRequestError),
    (401, errors.AuthenticationError),
    (403, errors.PermissionDeniedError),
    (404, errors.NotFoundError),
    (405, errors.APIStatusError),
    (409, errors.ConflictError),
    (413, errors.BadRequestError),
    (415, errors.BadRequestError),
    (422, errors.BadRequestError),
    (429, errors.RateLimitError),
    (500, errors.ServerError),
    (503, errors.OverloadedError),
]


@pytest.mark.parametrize(("status", "kind"), STATUS_ERRORS)
def test_each_status_has_its_error_and_its_number_of_attempts(
    connect: Connect, status: int, kind: type[errors.APIStatusError]
) -> None:
    body = answers.error("it is so", type="some_error", param="prompt", code="some_code")

    def handle(exchange: Exchange) -> None:
        exchange.answer(status, body, {"x-request-id": "r-1"})

    with loopback_server(handle) as server, pytest.raises(errors.APIStatusError) as caught:
        connect(server.url, model="tiny").call("complete", "x")
    error = caught.value
    assert type(error) is kind
    assert (error.message, error.type, error.param, error.code) == ("it is so", "some_error", "prompt", "some_code")
    assert (error.status, error.request_id, str(error)) == (status, "r-1", "it is so")
    assert len(server.requests) == (3 if status in (409, 429) or status >= 500 else 1)


def test_streams_are_retried_and_typed_before_they_begin(connect: Connect) -> None:
    def handle(exchange: Exchange) -> None:
        if len(server.requests) < 3:
            exchange.answer(503, answers.error("full", code="overloaded"))
        else:
            exchange.stream(answers.completion("x", "stop"))

    with loopback_server(handle) as server:
        assert connect(server.url, model="tiny").stream("stream_complete", "x").pieces == ["x"]
    assert len(server.requests) == 3
    assert server.requests[0].body == server.requests[2].body


@pytest.mark.parametrize("max_retries", [0, 1, 4])
def test_max_retries_is_honoured(connect: Connect, max_retries: int) -> None:
    with loopback_server(lambda exchange: exchange.answer(500, "")) as server, pytest.raises(errors.ServerError):
        connect(server.url, max_retries=max_retries).call("models")
    assert len(server.requests) == max_retries + 1


def test_negative_max_retries_is_refused() -> None:
    with pytest.raises(ValueError, match="max_retries"):
        Client("http://127.0.0.1:9", max_retries=-1)


@pytest.mark.parametrize(("header", "status", "attempts"), [("true", 400, 3), ("false", 503, 1), ("maybe", 503, 3)])
def test_x_should_retry_decides(connect: Connect, header: str, status: int, attempts: int) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.answer(status, answers.error(), {"x-should-retry": header})

    with loopback_server(handle) as server, pytest.raises(errors.APIStatusError):
        connect(server.url).call("models")
    assert len(server.requests) == attempts


def test_connection_that_breaks_is_tried_again(connect: Connect) -> None:
    def handle(exchange: Exchange) -> None:
        if len(server.requests) < 3:
            exchange.handler.close_connection = True
        else:
            exchange.answer(200, answers.MODELS)

    with loopback_server(handle) as server:
        assert connect(server.url).call("models")[0].id == "tiny"
    assert len(server.requests) == 3


def test_server_that_is_not_there_is_a_connection_error(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(errors.APIConnectionError) as caught:
        connect(f"http://127.0.0.1:{port}").call("models")
    assert not isinstance(caught.value, errors.APITimeoutError)
    assert str(caught.value) != ""


def test_silent_server_is_a_timeout(connect: Connect) -> None:
    timeout = httpx.Timeout(10, read=0.2)
    with loopback_server(lambda exchange: exchange.wait_for_disconnect()) as server:
        with pytest.raises(errors.APITimeoutError):
            connect(server.url, timeout=timeout, max_retries=1).call("models")
        until(lambda: len(server.requests) == 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>bad gateway", "HTTP 502: <html>bad gateway"),
        ("", "HTTP 502"),
        ('{"error": "plain"}', "plain"),
        ('{"detail": "from FastAPI"}', "from FastAPI"),
        ('{"error": {"no": "message"}}', '{"no": "message"}'),
    ],
)
def test_errors_without_the_envelope_still_say_something(connect: Connect, body: str, message: str) -> None:
    with (
        loopback_server(lambda exchange: exchange.answer(502, body)) as server,
        pytest.raises(errors.ServerError) as caught,
    ):
        connect(server.url, max_retries=0).call("models")
    assert caught.value.message == message


def _response(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("response", "delay_s"),
    [
        (_response(retry_after="3"), 3.0),
        (_response(retry_after="0.25"), 0.25),
        (_response(retry_after_ms="250", retry_after="9"), 0.25),
        (_response(retry_after_ms="nonsense", retry_after="9"), 9.0),
    ],
)
def test_server_says_how_long_to_wait(response: httpx.Response, delay_s: float) -> None:
    assert retry_delay_s(0, response) == delay_s


def test_server_may_give_a_date() -> None:
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < retry_delay_s(0, _response(retry_after=date)) <= 60


@pytest.mark.parametrize("value", ["nonsense", "-1", "0", "nan", "inf", "Mon, 01 Jan 1990 00:00:00 GMT"])
def test_useless_retry_after_means_backoff(value: str) -> None:
    assert should_retry(_response(retry_after=value))
    assert 0.375 <= retry_delay_s(0, _response(retry_after=value)) <= 0.5


def test_server_that_asks_for_too_much_is_not_waited_for() -> None:
    assert not should_retry(_response(retry_after="3600"))
    assert not should_retry(_response(retry_after="3600", x_should_retry="true"))


def test_backoff_doubles_up_to_a_limit() -> None:
    for attempt, longest_s in [(0, 0.5), (1, 1.0), (2, 2.0), (4, 8.0), (5, 8.0), (100_000, MAX_DELAY_S)]:
        assert 0.75 * longest_s <= retry_delay_s(attempt, None) <= longest_s
