"""Traces: what spans a request leaves behind, whose they are, and that nothing is recorded without a tracer."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.options import ServiceOptions
from server.startup.assemble import make_tracer
from server.startup.otel import OtelTracer
from server.startup.settings import read_settings
from server.text.tokenizer import Tokenizer
from server.tracing import NO_TRACER, current
from tests.ports import free_port
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"prompt": "x", "max_tokens": 3}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(options: ServiceOptions, byte_tokenizer: Tokenizer, spans: InMemorySpanExporter) -> Iterator[Loopback]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with serve(FakeEngine(), replace(options, keepalive_s=5), byte_tokenizer, tracer=OtelTracer(provider)) as server:
        yield server


def ask(server: Loopback, parent: str | None = None, **fields: object) -> httpx.Response:
    headers = {} if parent is None else {"traceparent": parent}
    return server.http.post("/v1/completions", json=BODY | fields, headers=headers)


def found(server: Loopback, spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans of one request, the last of which is its own."""
    server.wait_until(lambda: any(span.kind is SpanKind.SERVER for span in spans.get_finished_spans()))
    return {span.name: span for span in spans.get_finished_spans()}


def test_a_request_leaves_spans_of_its_parts_behind(traced: Loopback, spans: InMemorySpanExporter) -> None:
    ask(traced).raise_for_status()
    named = found(traced, spans)
    request = named.pop("POST /v1/completions")
    assert named.keys() == {"store", "queue", "prefill", "decode"}
    assert request.parent is None
    for span in named.values():
        assert span.parent is not None
        assert request.context is not None
        assert span.parent.span_id == request.context.span_id
    times = [named[name] for name in ("queue", "prefill", "decode")]
    assert [span.start_time for span in times[1:]] == [span.end_time for span in times[:-1]]
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.usage.output_tokens"] == 3
    assert request.attributes["gen_ai.response.finish_reasons"] == "length"
    assert request.status.status_code is StatusCode.UNSET
    assert named["decode"].attributes == {"tokens": 3, "finish_reason": "length"}


def test_a_request_takes_part_in_the_trace_of_who_sends_it(traced: Loopback, spans: InMemorySpanExporter) -> None:
    ask(traced, f"00-{TRACE}-{PARENT}-01", stream=True).raise_for_status()
    named = found(traced, spans)
    parent = named["POST /v1/completions"].parent
    assert parent is not None
    assert (f"{parent.trace_id:032x}", f"{parent.span_id:016x}") == (TRACE, PARENT)
    assert {f"{span.context.trace_id:032x}" for span in named.values() if span.context is not None} == {TRACE}
    metrics = traced.http.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
    assert f'trace_id="{TRACE}"' in metrics, "exemplars lead to the trace"


def test_who_does_not_sample_a_trace_decides_for_this_server_too(traced: Loopback, spans: InMemorySpanExporter) -> None:
    ask(traced, f"00-{TRACE}-{PARENT}-00").raise_for_status()
    ask(traced).raise_for_status()
    named = found(traced, spans)
    assert all(span.context is not None and f"{span.context.trace_id:032x}" != TRACE for span in named.values())


def test_errors_are_errors_of_their_span(traced: Loopback, spans: InMemorySpanExporter) -> None:
    traced.engine.fail_after = 0
    assert "engine_restarting" in ask(traced, stream=True).text
    named = found(traced, spans)
    request = named["POST /v1/completions"]
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes is not None
    assert request.attributes["error.type"] == "engine_restarting"
    assert "decode" not in named, "no token came"


def test_a_request_that_is_refused_has_its_own_span_alone(traced: Loopback, spans: InMemorySpanExporter) -> None:
    assert ask(traced, parent="not a parent", max_tokens=-1).status_code == 400
    assert found(traced, spans).keys() == {"POST /v1/completions"}


def test_polls_are_not_traced(traced: Loopback, spans: InMemorySpanExporter) -> None:
    for path in ("/health", "/ready", "/metrics"):
        traced.http.get(path).raise_for_status()
    ask(traced).raise_for_status()
    assert {span.name for span in found(traced, spans).values() if span.kind is SpanKind.SERVER} == {
        "POST /v1/completions"
    }


def test_without_a_collector_nothing_is_traced_and_nothing_of_it_is_imported() -> None:
    assert make_tracer(read_settings({})) is NO_TRACER
    assert current().trace_id is None
    code = "import server.app, sys; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_collector_that_is_away_holds_up_nobody(options: ServiceOptions, byte_tokenizer: Tokenizer) -> None:
    tracer = make_tracer(read_settings({"otlp_traces_endpoint": f"http://127.0.0.1:{free_port()}/v1/traces"}))
    with serve(FakeEngine(), options, byte_tokenizer, tracer=tracer) as server:
        ask(server).raise_for_status()
    tracer.close()
