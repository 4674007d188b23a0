"""Where the time of a request goes, as spans. Without a tracer all of this does nothing and costs nothing.

A trace begins with the HTTP request and is in the context of everything that the request awaits or starts. Whoever
answers it later, outside of that context, keeps it: `current` when the work begins.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol


class Trace(Protocol):
    """The spans of one request.

    Attributes:
        trace_id: 32 hexadecimal digits; None: nobody records them.
    """

    @property
    def trace_id(self) -> str | None: ...

    def span(self, name: str, begin_s: float, end_s: float, **attributes: str | float) -> None:
        """Records what lasted from `begin_s` to `end_s` of `time.perf_counter`."""
        ...

    def measured(self, name: str, **attributes: str | float) -> AbstractContextManager[None]:
        """Records what lasts as long as the context is open, and its error if it ends with one."""
        ...

    def end(self, status: int | None, facts: Mapping[str, object]) -> None:
        """Ends the request's own span, with what the log line says of it; `status`: None without an answer."""
        ...


class Tracer(Protocol):
    """Records traces somewhere."""

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Trace:
        """Begins the trace of a request, or takes part in that of its `traceparent`."""
        ...

    def close(self) -> None:
        """Hands on what was recorded; nothing is recorded afterwards."""
        ...


class NoTrace:
    """Of a request that nobody traces."""

    trace_id: str | None = None

    def span(self, name: str, begin_s: float, end_s: float, **attributes: str | float) -> None:
        """Records nothing."""

    def measured(self, name: str, **attributes: str | float) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self, status: int | None, facts: Mapping[str, object]) -> None:
        """Records nothing."""


class NoTracer:
    """Traces nothing."""

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Trace:
        return NO_TRACE

    def close(self) -> None:
        """Has nothing to hand on."""


NO_TRACE: Trace = NoTrace()
NO_TRACER: Tracer = NoTracer()
_current: ContextVar[Trace] = ContextVar("trace", default=NO_TRACE)


def current() -> Trace:
    """The trace of the request that is being answered."""
    return _current.get()


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Makes a trace the current one while the context is open."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)
