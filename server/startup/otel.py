"""Traces in OpenTelemetry (extra `otel`): one span for each request, and below it those of its parts."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.tracing import Trace

EXPORT_TIMEOUT_S = 5
FACTS = {
    "route": "http.route",
    "key": "dijiang.tenant",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reason": "gen_ai.response.finish_reasons",
    "first_token_ms": "dijiang.first_token_ms",
    "error": "error.type",
}
"""Of a log line, and what OpenTelemetry calls them."""


class OtelTracer:
    """Spans of a provider. It is not made the global one: nothing else in the process is traced."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("dijiang")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def exporting(cls, endpoint: str, *, version: str) -> "OtelTracer":
        """Hands spans in batches, on a thread of its own, to a collector that speaks OTLP over HTTP.

        Args:
            endpoint: for traces, such as http://localhost:4318/v1/traces.
            version: of this server.
        """
        ours = Resource({"service.name": "dijiang", "service.version": version})
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Trace:
        context = self._propagator.extract(headers)
        attributes = {"http.request.method": method, "url.path": path}
        span = self._tracer.start_span(method, context=context, kind=SpanKind.SERVER, attributes=attributes)
        return _Request(self, span, method)

    def close(self) -> None:
        self._provider.shutdown()

    def child(self, parent: Span, name: str, begin_ns: int, attributes: Mapping[str, str | float]) -> Span:
        """A span below another, from a moment on."""
        context = set_span_in_context(parent)
        return self._tracer.start_span(name, context=context, start_time=begin_ns, attributes=attributes)


class _Request:
    def __init__(self, tracer: OtelTracer, span: Span, method: str) -> None:
        self._tracer = tracer
        self._method = method
        self._span = span
        self._is_recorded = span.is_recording()  # also of what ends after it
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    @property
    def trace_id(self) -> str | None:
        return format_trace_id(self._span.get_span_context().trace_id) if self._is_recorded else None

    def span(self, name: str, begin_s: float, end_s: float, **attributes: str | float) -> None:
        if self._is_recorded:
            child = self._tracer.child(self._span, name, self._at(begin_s), attributes)
            child.end(self._at(end_s))

    def measured(self, name: str, **attributes: str | float) -> AbstractContextManager[None]:
        return self._measured(name, attributes) if self._is_recorded else nullcontext()

    @contextmanager
    def _measured(self, name: str, attributes: Mapping[str, str | float]) -> Iterator[None]:
        begin_s = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self.span(name, begin_s, time.perf_counter(), **attributes, **{"error.type": type(error).__name__})
            raise
        self.span(name, begin_s, time.perf_counter(), **attributes)

    def end(self, status: int | None, facts: Mapping[str, object]) -> None:
        span = self._span
        span.update_name(f"{self._method} {facts.get('route', '')}".strip())
        known = {FACTS[name]: value for name, value in facts.items() if name in FACTS}
        span.set_attributes({name: value for name, value in known.items() if isinstance(value, str | int | float)})
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if status is None or status >= 500 or "error" in facts:
            span.set_status(StatusCode.ERROR)
        span.end()

    def _at(self, moment_s: float) -> int:
        return self._offset_ns + int(1e9 * moment_s)
