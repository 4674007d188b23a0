"""What one answer has cost and how long each part of it took: counted, timed, and recorded as spans."""

import time
from collections.abc import Sequence

import structlog

from server.engine.types.requests import GenerationRequest
from server.metrics import Metrics
from server.tracing import Trace


class Measures:
    """Of one choice, from its admission on.

    Attributes:
        first_token_s: from its admission to its first token; None: none has come.
        reason: why it ended; None: it has not.
    """

    def __init__(self, metrics: Metrics, trace: Trace, tenant: str, request: GenerationRequest) -> None:
        """
        Args:
            tenant: the label of whose it is.
        """
        self._metrics = metrics
        self._trace = trace
        self._tenant = tenant
        http_request: dict[str, str] = structlog.contextvars.get_contextvars()
        self._exemplar = {name: http_request[name] for name in ("request_id",) if name in http_request}
        if trace.trace_id is not None:
            self._exemplar["trace_id"] = trace.trace_id
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_tokens = 0
        self._begin = self._last = time.perf_counter()
        self._begun: float | None = None
        self.first_token_s: float | None = None
        self.reason: str | None = None

    @property
    def end_reason(self) -> str:
        """Why it ended, or would if it ended now."""
        return "abort" if self.reason is None else self.reason

    def begun(self) -> None:
        """Notes that it has got its slot."""
        self._begun = time.perf_counter()
        self._metrics.queue_time.observe(self._begun - self._begin, self._exemplar)

    def tokens(self, num_tokens: int) -> None:
        """Counts tokens that have come."""
        now = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = now - self._begin
            self._metrics.time_to_first_token.observe(self.first_token_s, self._exemplar)
            self._metrics.tenant_time_to_first_token.labels(self._tenant).observe(self.first_token_s, self._exemplar)
        else:
            self._metrics.inter_token_latency.observe((now - self._last) / num_tokens)
        self._last = now
        self._num_tokens += num_tokens
        self._metrics.generation_tokens.inc(num_tokens)

    def end(self, *, num_tokens: int) -> None:
        """Counts the end, once, of an answer of so many tokens, those from before it was suspended among them."""
        metrics, now = self._metrics, time.perf_counter()
        metrics.finished.labels(self.end_reason).inc()
        metrics.tenant_finished.labels(self._tenant, self.end_reason).inc()
        metrics.tenant_generation_tokens.labels(self._tenant).inc(self._num_tokens)
        metrics.e2e_latency.observe(now - self._begin, self._exemplar)
        metrics.prompt_length.observe(self._num_prompt_tokens)
        metrics.answer_length.observe(num_tokens)
        self._record(now)

    def _record(self, now: float) -> None:
        begun = now if self._begun is None else self._begun
        first = now if self.first_token_s is None else self._begin + self.first_token_s
        self._trace.span("queue", self._begin, min(begun, first))
        if self._begun is not None:
            self._trace.span("prefill", begun, first, prompt_tokens=self._num_prompt_tokens)
        if self.first_token_s is not None:
            self._trace.span("decode", first, now, tokens=self._num_tokens, finish_reason=self.end_reason)


def log_facts(measures: Sequence[Measures], error_code: str | None) -> dict[str, object]:
    """What a request's log line says of the times and ends of its choices."""
    firsts = [one.first_token_s for one in measures if one.first_token_s is not None]
    facts: dict[str, object] = {
        "first_token_ms": round(1e3 * min(firsts), 1) if firsts else None,
        "finish_reason": ",".join(sorted({one.end_reason for one in measures})),
    }
    return facts if error_code is None else {**facts, "error": error_code}
