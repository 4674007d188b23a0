"""What operators may do, and nobody else: `/admin/` with keys of its own."""

import hashlib
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.types.requests import GenerationRequest, TokenEvent
from server.options import ServiceOptions
from server.selfcheck import chunkings
from server.text.tokenizer import Tokenizer
from tests.e2e.serving import serving
from tests.server.conftest import Loopback, serve
from tests.server.fake_engine import FakeEngine
from tests.server.tiny_engine import TinyEngine
from tests.tiny_models import tiny_network, write_tiny_model
from tests.waiting import PATIENCE_S

ADMIN = {"authorization": "Bearer root"}
CACHE = {"prefix_cache_host_bytes": 1 << 24, "prefix_cache_min_tokens": 4}
CHECK = {"num_prompt_tokens": 40, "num_generated_tokens": 16}


def hashed(*keys: str) -> frozenset[bytes]:
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


@pytest.fixture
def keyed(options: ServiceOptions) -> ServiceOptions:
    return replace(options, key_hashes=hashed("user"), admin_key_hashes=hashed("root", "other-root"))


def order(server: Loopback, what: str, **body: Any) -> httpx.Response:
    return server.http.post(f"/admin/{what}", json=body, headers=ADMIN)


def test_a_drain_waits_for_what_runs_and_hands_over_what_is_left(
    byte_tokenizer: Tokenizer, keyed: ServiceOptions
) -> None:
    gate = threading.Event()
    user = {"authorization": "Bearer user"}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 9}, headers=user))

    with serve(FakeEngine(hold_after=1, gate=gate), keyed, byte_tokenizer) as server:
        asking = threading.Thread(target=ask)
        asking.start()
        server.wait_until(lambda: server.service.num_active == 1)
        assert order(server, "drain").json()["active"] == 1
        handed = order(server, "drain", wait_s=0.1, hand_over=True)
        assert (handed.json()["status"], handed.json()["active"]) == ("draining", 0)
        asking.join(PATIENCE_S)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "server_shutdown")
        assert answers[0].headers["x-dijiang-retry"] == "another-replica"
        refused = server.http.post("/v1/completions", json={"prompt": "x"}, headers=user)
        assert refused.headers["x-dijiang-retry"] == "another-replica"
        assert order(server, "resume").json()["status"] == "ok"
        gate.set()
        asking = threading.Thread(target=ask)
        asking.start()
        assert order(server, "drain", wait_s=PATIENCE_S).json()["active"] == 0
        asking.join(PATIENCE_S)
    assert answers[1].status_code in (200, 503)  # before the drain, or after it


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/status"),
        ("POST", "/admin/drain"),
        ("POST", "/admin/resume"),
        ("POST", "/admin/cache/reset"),
        ("POST", "/admin/reload"),
        ("POST", "/admin/selfcheck"),
        ("GET", "/admin/nothing"),
    ],
)
def test_only_an_admin_key_opens_it(
    byte_tokenizer: Tokenizer, options: ServiceOptions, keyed: ServiceOptions, method: str, path: str
) -> None:
    engine = FakeEngine()
    with serve(engine, keyed, byte_tokenizer) as server:
        for headers in ({}, {"authorization": "Bearer user"}, {"authorization": "Basic root"}):
            refused = server.http.request(method, path, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        assert not server.service.paused
    assert (engine.orders, engine.submitted) == ([], [])
    with serve(engine, options, byte_tokenizer) as server:  # everybody is let in, but not there
        for headers in ({}, ADMIN, {"authorization": "Bearer"}):
            refused = server.http.request(method, path, headers=headers)
            assert refused.status_code == 401
            assert "no admin key" in refused.json()["error"]["message"]


def test_an_admin_key_is_no_other_key(byte_tokenizer: Tokenizer, keyed: ServiceOptions) -> None:
    with serve(FakeEngine(), keyed, byte_tokenizer) as server:
        assert server.http.get("/v1/models", headers=ADMIN).status_code == 401
        assert server.http.get("/admin/status", headers={"authorization": "Bearer other-root"}).status_code == 200


@pytest.mark.parametrize("path", ["//admin/status", "/v1//admin/status", "/Admin/status", "/admin%2Fstatus/"])
def test_no_other_spelling_of_the_path_leads_there(
    byte_tokenizer: Tokenizer, options: ServiceOptions, path: str
) -> None:
    with serve(FakeEngine(), options, byte_tokenizer) as server:
        assert server.http.get(f"{server.url}{path}").status_code in {401, 404}


def test_a_drained_server_finishes_what_runs_and_can_go_on(byte_tokenizer: Tokenizer, keyed: ServiceOptions) -> None:
    gate = threading.Event()
    with serve(FakeEngine(hold_after=1, gate=gate), keyed, byte_tokenizer) as server:
        asking = threading.Thread(target=server.http.post, args=("/v1/completions",), kwargs=USER_REQUEST)
        asking.start()
        server.wait_until(lambda: server.service.num_active == 1)
        assert order(server, "drain").json() == {"status": "draining", "active": 1, "engine_restarts": 0}
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health").status_code == 200
        refused = server.http.post("/v1/completions", **USER_REQUEST)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        gate.set()
        asking.join(PATIENCE_S)
        assert order(server, "resume").json() == {"status": "ok", "active": 0, "engine_restarts": 0}
        assert server.http.post("/v1/completions", **USER_REQUEST).status_code == 200


USER_REQUEST: dict[str, Any] = {
    "json": {"prompt": "x", "max_tokens": 3},
    "headers": {"authorization": "Bearer user"},
}


def test_a_signal_after_a_drain_by_an_operator_is_the_first_one(
    byte_tokenizer: Tokenizer, keyed: ServiceOptions
) -> None:
    gate = threading.Event()
    engine = FakeEngine(hold_after=1, gate=gate)
    with serve(engine, keyed, byte_tokenizer, drain_timeout_s=60) as server:
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", trust_env=False, **USER_REQUEST))
        )
        asking.start()
        server.wait_until(lambda: server.service.num_active == 1)
        order(server, "drain")
        server.signal()
        gate.set()
        asking.join(PATIENCE_S)
        server.thread.join(PATIENCE_S)
    assert answers[0].status_code == 200


def test_orders_reach_the_engine(byte_tokenizer: Tokenizer, keyed: ServiceOptions) -> None:
    engine = FakeEngine()
    with serve(engine, keyed, byte_tokenizer) as server:
        assert server.http.post("/admin/cache/reset", headers=ADMIN).status_code == 200  # no body, no content type
        refused = order(server, "reload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
        server.service._read_again = lambda: (keyed, byte_tokenizer)
        assert order(server, "reload", timeout_s=0).json()["status"] == "ok"
        assert order(server, "reload", timeout_s=-1).json()["error"]["param"] == "timeout_s"
        server.service._read_again = lambda: (keyed, None)
        assert order(server, "reload").json()["error"]["code"] == "reload_failed"
        engine.status = "restarting"
        assert order(server, "reload").status_code == 503
        assert not server.service.paused
    assert engine.orders == ["reset_cache", "reload"]


def test_a_selfcheck_compares_every_way_to_compute(byte_tokenizer: Tokenizer, keyed: ServiceOptions) -> None:
    engine = TinyEngine(tiny_network(), "tiny", **CACHE)
    with serve(engine, keyed, byte_tokenizer) as server:  # type: ignore[arg-type]
        report = order(server, "selfcheck", **CHECK).json()
        assert (report["object"], report["passed"], report["num_tokens"]) == ("selfcheck", True, 56)
        assert report["largest_difference"] < 1e-4  # roundings of fp32
        numbers = {finding["name"]: finding["num_values"] for finding in report["findings"]}
        assert numbers["decoded token by token"] == 16
        assert numbers["decoded in a batch with others, one prefill for two"] == 16
        assert numbers["read behind cached prefixes"] >= 5
        assert all(numbers[name] == 55 for name in chunkings(56))
        assert numbers["read in a batch with others"] == 55
        for wrong in ({"num_prompt_tokens": 3}, {"num_generated_tokens": 10**6}, {"tolerance": -1}):
            assert order(server, "selfcheck", **wrong).json()["error"]["param"] == next(iter(wrong))
        assert engine.engine.stats.num_free_slots == 4


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda request: bool(request.cuts), "read in chunks of 1, 2, 3, ..."),
        (lambda request: request.states.cache_namespace is not None, "read behind cached prefixes"),
        (lambda request: request.group is not None, "decoded in a batch with others, one prefill for two"),
    ],
)
def test_a_selfcheck_finds_a_way_that_differs(
    byte_tokenizer: Tokenizer, keyed: ServiceOptions, fault: Any, found: str
) -> None:
    class Drifting(TinyEngine):
        """Reads another first token whenever there is a chance that nobody notices."""

        def submit(self, request: GenerationRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]:
            if fault(request):
                first = (request.prompt_token_ids[0] + 1) % 256
                request = replace(request, prompt_token_ids=(first, *request.prompt_token_ids[1:]))
            return super().submit(request)

    engine = Drifting(tiny_network(), "tiny", **CACHE)
    with serve(engine, keyed, byte_tokenizer) as server:  # type: ignore[arg-type]
        report = order(server, "selfcheck", **CHECK).json()
    differences = {finding["name"]: finding["largest_difference"] for finding in report["findings"]}
    assert not report["passed"]
    assert differences[found] > 0.01
    assert report["largest_difference"] == max(differences.values())


def test_a_real_server_checks_itself_forgets_and_loads_again(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    options = ("--admin-keys", "root", "--prefix-cache-min-tokens", "8", "--max-step-tokens", "64")
    with serving(folder, *options, "--max-conversations", "8") as server, httpx.Client(timeout=PATIENCE_S) as http:

        def post(path: str, **body: Any) -> dict[str, Any]:
            answer = http.post(f"{server.base_url}{path}", json=body, headers=ADMIN)
            assert answer.status_code == 200, answer.text
            return answer.json()  # type: ignore[no-any-return]

        def ask() -> tuple[str, int]:
            answer = post("/v1/completions", prompt="Once upon a time, ", temperature=0, max_tokens=8)
            return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        report = post("/admin/selfcheck", num_prompt_tokens=100)
        assert report["passed"]
        assert report["largest_difference"] < 1e-3
        assert all(finding["num_values"] > 0 for finding in report["findings"])
        text, _ = ask()
        assert ask()[1] > 0
        post("/admin/cache/reset")
        assert ask() == (text, 0)
        pid = server.engine.pid
        other = write_tiny_model(tmp_path / "other", seed=1)
        shutil.copy(other / "model.safetensors", folder / "model.safetensors")
        assert post("/admin/reload") == {"status": "ok", "active": 0, "engine_restarts": 0}
        assert server.engine.pid != pid
        changed, num_cached = ask()
        assert num_cached == 0
        assert changed != text

        def refused(**body: Any) -> str:
            answer = http.post(f"{server.base_url}/admin/reload", json=body, headers=ADMIN)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "reload_failed"), answer.text
            assert ask()[0] == changed  # the old one goes on
            return str(answer.json()["error"]["message"])

        pid = server.engine.pid
        whole = (folder / "model.safetensors").read_bytes()
        # Files that are in use are replaced, not written to: they are mapped into the memory of the engine.
        for number, damaged in enumerate((whole[:-1000], b"\xff" * 64, b"")):
            (folder / f"{number}").write_bytes(damaged)
            (folder / f"{number}").rename(folder / "model.safetensors")
            assert "keeps serving" in refused()
        (folder / "model.safetensors").unlink()
        assert "keeps serving" in refused()
        (folder / "config.json").rename(folder / "config.gone")
        assert "cannot be used" in refused()
        (folder / "config.gone").rename(folder / "config.json")
        (folder / "whole").write_bytes(whole)
        (folder / "whole").rename(folder / "model.safetensors")
        assert server.engine.pid == pid
        assert post("/admin/reload", beside=False)["status"] == "ok"
        assert server.engine.pid != pid
        assert ask()[0] == changed
