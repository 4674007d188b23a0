"""What operators see: models, health, readiness, metrics, keys, request ids, tokenizer routes."""

import hashlib
import io
import json
import logging
from dataclasses import replace

import httpx
import openai
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from server.engine.types.requests import EngineInfo
from server.keys import KeyFacts, hash_key, owner_of
from server.options import ServiceOptions
from server.startup.logs import configure_logging
from server.text.tokenizer import Tokenizer
from tests.server.conftest import Loopback, raw_exchange, serve
from tests.server.fake_engine import FakeEngine

MODEL = "org/tiny"


def test_models_are_listed_and_found_by_ids_with_slashes(server: Loopback) -> None:
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    model = server.openai.models.retrieve(MODEL)
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "dijiang")
    card = server.http.get(f"/v1/models/{MODEL}").json()
    assert (card["max_model_len"], card["max_prompt_tokens"]) == (1 << 20, None)


@pytest.mark.parametrize("status", ["loading", "restarting", "failed", "stopped"])
def test_health_and_readiness_tell_the_engines_state(server: Loopback, status: str) -> None:
    server.engine.status = status
    for path in ("/health", "/ready"):
        answer = server.http.get(path)
        assert (answer.status_code, answer.json()["status"]) == (503, status)
        assert answer.headers["retry-after"].isdigit()
    server.engine.status = "ready"
    steps = {"steps": "torch", "slow_because": None}
    assert server.http.get("/health").json() == {"status": "ok", "engine_restarts": 0, **steps}
    assert server.http.get("/ready").json() == {"status": "ok"}


def test_health_says_why_steps_are_slow(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    class StaleEngine(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, slow_because="the kernels are old; `make kernels` mends it")

    with serve(StaleEngine(), options, byte_tokenizer) as server:
        answer = server.http.get("/health")
        assert answer.status_code == 200
        assert answer.json()["slow_because"] == "the kernels are old; `make kernels` mends it"


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_can_be_asked_for_without_a_body(server: Loopback, path: str) -> None:
    for status in ("ready", "loading"):
        server.engine.status = status
        answer = server.http.head(path)
        assert (answer.status_code, answer.content) == (server.http.get(path).status_code, b"")


@pytest.mark.parametrize("status", ["loading", "restarting", "draining"])
def test_every_answer_says_alike_when_to_try_again(
    byte_tokenizer: Tokenizer, options: ServiceOptions, status: str
) -> None:
    with serve(FakeEngine(), replace(options, retry_after_s=7), byte_tokenizer) as server:
        server.service.draining = status == "draining"
        server.engine.status = "ready" if status == "draining" else status
        answers = [
            server.http.get("/ready"),
            server.http.post("/v1/completions", json={"prompt": "x"}),
            server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}),
            server.http.get("/v1/capacity"),
        ]
        assert [answer.status_code for answer in answers] == [503] * 4
        assert {answer.headers["retry-after"] for answer in answers} == {"7"}
        assert server.http.get("/health").headers.get("retry-after") == (None if status == "draining" else "7")


def test_a_restart_that_takes_long_says_so(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    class SlowEngine(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, load_s=11.2)

    with serve(SlowEngine(status="restarting"), options, byte_tokenizer) as server:
        assert server.http.get("/ready").headers["retry-after"] == "12"


def test_while_draining_new_work_is_refused_but_health_is_good(server: Loopback) -> None:
    server.service.draining = True
    assert server.http.get("/health").json()["status"] == "draining"
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 503
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "draining")
    assert caught.value.response.headers["retry-after"].isdigit()


def test_a_request_that_can_never_work_is_a_400_even_while_loading(server: Loopback) -> None:
    server.engine.status = "loading"
    assert server.http.post("/v1/completions", json={"prompt": ""}).status_code == 400
    assert server.http.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_the_version_is_told(server: Loopback) -> None:
    assert server.http.get("/version").json() == {"version": "1.2.3"}


def test_openmetrics_have_exemplars_that_name_the_request(server: Loopback) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    server.http.post("/v1/completions", json=body, headers={"x-request-id": "r-7"}).raise_for_status()
    answer = server.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics_families(answer.text)}
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "tenant_time_to_first_token"):
        exemplars = [sample.exemplar for sample in families[f"dijiang_{name}_seconds"].samples if sample.exemplar]
        assert {"request_id": "r-7"} in [exemplar.labels for exemplar in exemplars], name
    assert server.http.get("/metrics").headers["content-type"].startswith("text/plain")


def test_metrics_and_log_lines_say_whose_a_request_was(
    options: ServiceOptions, byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {name: hash_key(f"sk-{name}".encode()) for name in ("ann", "bob")}
    options = replace(
        options, key_hashes=frozenset(keys.values()), keys=(KeyFacts(keys["ann"], "ann"),), default_answer_tokens=0
    )
    unnamed = f"key-{owner_of(keys['bob'])[:8]}"
    with serve(FakeEngine(), options, byte_tokenizer) as server:

        def ask(key: str, **fields: object) -> httpx.Response:
            headers = {"authorization": f"Bearer sk-{key}"}
            return server.http.post("/v1/completions", json={"prompt": "x", **fields}, headers=headers)

        assert ask("ann", max_tokens=3).status_code == 200
        assert ask("bob", max_tokens=2).status_code == 200
        assert ask("bob", max_tokens="many").status_code == 400
        server.engine.fail_after = 1
        assert "engine_restarting" in ask("ann", stream=True).text
        text = server.http.get("/metrics").text
        server.wait_until(lambda: "'error': 'engine_restarting'" in caplog.text)
        lines = [record.getMessage() for record in caplog.records if "first_token_ms" in record.getMessage()]
        refused = next(record.getMessage() for record in caplog.records if "invalid_value" in record.getMessage())
    assert 'dijiang_tenant_requests_finished_total{finished_reason="length",tenant="ann"} 1.0' in text
    assert 'dijiang_tenant_requests_finished_total{finished_reason="error",tenant="ann"} 1.0' in text
    assert f'dijiang_tenant_generation_tokens_total{{tenant="{unnamed}"}} 2.0' in text
    assert f'dijiang_tenant_prompt_tokens_total{{tenant="{unnamed}"}}' in text
    whole, other, failed = lines
    for line, key in ((whole, "ann"), (other, unnamed), (failed, "ann")):
        assert f"'key': '{key}'" in line
        assert "'model': 'org/tiny'" in line
    assert "'finish_reason': 'length'" in whole
    assert "'error'" not in whole
    assert "'error': 'engine_restarting'" in failed
    assert "'status': 200" in failed
    assert f"'key': '{unnamed}'" in refused
    assert "'status': 400" in refused


def test_metrics_count_what_happened(server: Loopback) -> None:
    def value(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return float(next((line.split()[-1] for line in lines if line.startswith(name + " ")), "0"))

    before = value("dijiang_generation_tokens_total"), value("dijiang_time_to_first_token_seconds_count")
    server.openai.completions.create(model=MODEL, prompt="x", max_tokens=5, n=2)
    after = value("dijiang_generation_tokens_total"), value("dijiang_time_to_first_token_seconds_count")
    assert (after[0] - before[0], after[1] - before[1]) == (10, 2)
    assert value("dijiang_slots_free") == 8
    assert value("dijiang_state_bytes") == 8 * 4096
    assert value("dijiang_engine_up") == 1
    assert "dijiang_inter_token_latency_seconds_bucket" in server.http.get("/metrics").text


def test_openapi_describes_every_route_and_field(server: Loopback) -> None:
    description = server.http.get("/openapi.json").json()
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health", "/metrics"}
    assert paths <= set(description["paths"])
    fields = description["components"]["schemas"]["CompletionRequest"]["properties"]
    assert all("description" in field for field in fields.values())
    assert "temperature" in fields
    answers = description["paths"]["/v1/completions"]["post"]["responses"]
    assert set(answers) == {"200", "default"}
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}


@pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("x" * 65, False), ("a b", False), ("é".encode(), False)])
def test_a_short_printable_request_id_is_echoed_else_one_is_made(
    server: Loopback, sent: str | bytes, kept: bool
) -> None:
    answer = server.http.get("/health", headers={"X-Request-Id": sent})
    assert (answer.headers["x-request-id"] == sent) == kept
    assert len(answer.headers["x-request-id"]) >= 5


def test_a_bug_is_a_500_without_details(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bytes:
        raise RuntimeError("secret path /srv/model")

    monkeypatch.setattr(server.service.metrics, "render", broken)
    answer = server.http.get("/metrics", headers={"X-Request-Id": "r-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "r-1" in answer.json()["error"]["message"]


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_log_lines_cannot_be_forged_and_hold_no_prompt(server: Loopback, log_format: str) -> None:
    output = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        configure_logging(level="info", log_format=log_format, stream=output)
        server.http.get("/%0aforged%0d%1b%5b31m")
        server.http.post("/v1/completions", json={"prompt": "my secret prompt", "max_tokens": 1, "user": "u\nforged"})
        server.wait_until(lambda: "completion_tokens" in output.getvalue())
    finally:
        root.handlers, root.level = handlers, level
    assert "secret" not in output.getvalue()
    assert "\nforged" not in output.getvalue()
    assert "\x1b[31m" not in output.getvalue()


def test_tokenize_and_detokenize_are_inverse(server: Loopback) -> None:
    text = "Hi 東京<|im_end|>"
    body = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["tokens"][-1] == 258
    assert server.http.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokenize_renders_conversations(server: Loopback) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    tokens = server.http.post("/tokenize", json=body).json()["tokens"]
    assert tokens == [257, *b"user\nx", 258, *b"\n"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"model": "other", "tokens": []}, "model"),
    ],
)
def test_bad_tokenizer_requests_name_the_field(
    server: Loopback, path: str, body: dict[str, object], param: str
) -> None:
    answer = server.http.post(path, json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param


def test_tokenizer_info_names_special_tokens_and_template(server: Loopback) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert info["chat_template"].startswith("{%")


def test_without_a_tokenizer_token_ids_go_in_and_out(options: ServiceOptions) -> None:
    with serve(FakeEngine(), options, None) as server:
        answer = server.http.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 3}).json()
        assert answer["choices"][0]["text"] == ""
        assert answer["choices"][0]["token_ids"] == list(b"The")
        streamed = server.http.post("/v1/completions", json={"prompt": [1], "max_tokens": 3, "stream": True}).text
        chunks = [json.loads(chunk.removeprefix("data: ")) for chunk in streamed.split("\n\n")[:-2]]
        assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == list(b"The")
        for path, body, param in [
            ("/v1/completions", {"prompt": "text"}, "prompt"),
            ("/v1/completions", {"prompt": [1], "stop": "x"}, "stop"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
            ("/tokenize", {"prompt": "x"}, "prompt"),
            ("/detokenize", {"tokens": [1]}, "tokens"),
        ]:
            refused = server.http.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
            assert refused.json()["error"]["code"] == "no_tokenizer"
        assert server.http.get("/tokenizer_info").status_code == 404


def test_a_prompt_over_the_operators_limit_has_its_own_code(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    with serve(FakeEngine(), replace(options, max_prompt_tokens=4), byte_tokenizer) as server:
        with pytest.raises(openai.BadRequestError, match="5 tokens, the limit set here is 4") as caught:
            server.openai.completions.create(model=MODEL, prompt="12345")
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        assert server.http.post("/v1/completions", json={"prompt": "1234"}).status_code == 200
        assert server.http.get(f"/v1/models/{MODEL}").json()["max_model_len"] == 4


def test_with_keys_only_who_knows_one_is_let_in(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    hashes = frozenset(hashlib.sha256(key.encode()).digest() for key in ("sk-one", "sk-two", "schlüssel"))
    with serve(FakeEngine(), replace(options, key_hashes=hashes), byte_tokenizer) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic sk-one"},
            {"Authorization": "é"},
        ):
            raw = {name: value.encode() for name, value in headers.items()}
            answer = server.http.post("/v1/completions", json={"prompt": "x"}, headers=raw)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            server.openai.models.list()
        assert server.openai.with_options(api_key="sk-two").models.list().data[0].id == MODEL
        umlaut = {"Authorization": "bearer schlüssel".encode()}
        assert server.http.get("/v1/models", headers=umlaut).status_code == 200
        assert [server.http.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        assert server.http.get("/openapi.json").status_code == 401
    with serve(FakeEngine(), replace(options, key_hashes=hashes, metrics_need_key=True), byte_tokenizer) as server:
        assert server.http.get("/metrics").status_code == 401


def test_web_pages_of_other_origins_are_let_in_only_by_setting(server: Loopback, byte_tokenizer: Tokenizer) -> None:
    headers = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in server.http.get("/health", headers=headers).headers
    options = replace(server.service.options, cors_origins=("https://a.example",), key_hashes=frozenset({b"x" * 32}))
    with serve(FakeEngine(), options, byte_tokenizer) as open_server:
        allowed = open_server.http.get("/v1/models", headers=headers)
        assert allowed.status_code == 401
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        preflight = {
            **headers,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        assert open_server.http.options("/v1/completions", headers=preflight).status_code == 200


def test_a_body_that_trickles_is_a_408(byte_tokenizer: Tokenizer, options: ServiceOptions) -> None:
    with serve(FakeEngine(), replace(options, body_timeout_s=0.05), byte_tokenizer) as server:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
        )
        answer = raw_exchange(server, head, b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer


def test_the_engine_is_told_whose_a_request_is_and_what_that_one_may_have(
    options: ServiceOptions, byte_tokenizer: Tokenizer
) -> None:
    hashes = frozenset(hashlib.sha256(key).digest() for key in (b"one", b"two"))
    limited = replace(options, key_hashes=hashes, max_running_per_key=3, max_queue_per_key=5, priority_across_keys=True)
    with serve(FakeEngine(), limited, byte_tokenizer) as server:
        for key in ("one", "two", "one"):
            headers = {"authorization": f"Bearer {key}"}
            server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
        first, second, third = (request.tenant for request in server.engine.submitted)
        assert first == third != second
        assert (first.max_running, first.max_waiting, first.outranks) == (3, 5, True)
        assert "one" not in first.name


@pytest.mark.parametrize(("wanted", "given"), [({}, 40), ({"max_tokens": 7}, 7), ({"max_tokens": 1_000}, 40)])
def test_no_answer_is_longer_than_the_operator_allows(
    options: ServiceOptions, byte_tokenizer: Tokenizer, wanted: dict[str, int], given: int
) -> None:
    with serve(FakeEngine(), replace(options, max_answer_tokens=40), byte_tokenizer) as server:
        body = {"messages": [{"role": "user", "content": "x"}], **wanted}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert server.engine.submitted[0].sampling.max_tokens == given


@pytest.mark.parametrize(
    ("default", "most", "wanted", "given"),
    [(20, 40, None, 20), (20, 40, 30, 30), (20, 40, 50, 40), (20, 0, None, 20), (0, 40, None, 40), (50, 40, None, 40)],
)
def test_a_chat_that_sets_no_limit_ends_at_the_default_one(
    options: ServiceOptions, byte_tokenizer: Tokenizer, default: int, most: int, wanted: int | None, given: int
) -> None:
    options = replace(options, default_answer_tokens=default, max_answer_tokens=most)
    with serve(FakeEngine(), options, byte_tokenizer) as server:
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": wanted}
        server.http.post("/v1/chat/completions", json=chat)
        server.http.post("/v1/responses", json={"input": "x", "max_output_tokens": wanted, "store": False})
        server.http.post("/v1/completions", json={"prompt": "x"})
        limits = [request.sampling.max_tokens for request in server.engine.submitted]
        assert limits == [given, given, 16]
