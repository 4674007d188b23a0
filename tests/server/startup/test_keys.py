"""Keys with names, weights and limits, from a file that is read again when it changes."""

import hashlib
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from server.keys import KeyFacts, owner_of
from server.options import ServiceOptions
from server.startup.errors import StartError
from server.startup.keys import Files, key_options, read_keys_file
from server.startup.settings import read_settings
from server.text.tokenizer import Tokenizer
from tests.server.conftest import serve
from tests.server.fake_engine import FakeEngine
from tests.server.states.running import ANN, running
from tests.tiny_models import write_tiny_model
from tests.waiting import until

TEXT = """
[[keys]]
name = "carl"
key = "sk-carl"
weight = 3
max_running = 2
rate_limit_requests = 1

[[keys]]
name = "root"
key = "sha256:{digest}"
role = "admin"
"""


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(TEXT.format(digest=digest_of("sk-root").hex()))
    return path


def test_a_file_says_what_each_key_is_and_may_have(file: Path) -> None:
    carl, root = read_keys_file(file)
    assert carl == KeyFacts(digest_of("sk-carl"), "carl", weight=3, max_running=2, rate_limit_requests=1)
    assert root == KeyFacts(digest_of("sk-root"), "root", is_admin=True)
    options = key_options(read_settings({"keys_file": str(file), "api_keys": "sk-other"}))
    assert options["key_hashes"] == {digest_of("sk-carl"), digest_of("sk-other")}
    assert options["admin_key_hashes"] == {digest_of("sk-root")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys: Field required"),
        ("keys = []", "at least 1 item"),
        ('[[keys]]\nname = "a"', "keys.0.key: Field required"),
        ('[[keys]]\nname = "a b"\nkey = "SECRET"', "keys.0.name"),
        ('[[keys]]\nname = "a"\nkey = "SECRET"\nweight = 0', "greater than or equal to 1"),
        ('[[keys]]\nname = "a"\nkey = "SECRET"\nlimit = 1', "keys.0.limit: Extra inputs"),
        ('[[keys]]\nname = "a"\nkey = "sha256:SECRET"', "64 hexadecimal digits"),
        ('[[keys]]\nname = "a"\nkey = "SECRET"\n[[keys]]\nname = "a"\nkey = "x"', "the same name is there twice"),
        ('[[keys]]\nname = "a"\nkey = "SECRET"\n[[keys]]\nname = "b"\nkey = "SECRET"', "the same key is there twice"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence_without_its_keys(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(StartError) as refusal:
        read_keys_file(file)
    assert message in str(refusal.value)
    assert "SECRET" not in str(refusal.value)


def test_a_change_of_a_file_is_seen_once(file: Path) -> None:
    files = Files((None, file))
    assert not files.have_changed()
    file.write_text(file.read_text() + "\n")
    assert files.have_changed()
    assert not files.have_changed()
    file.unlink()
    assert files.have_changed()


def test_keys_may_change_while_the_server_runs(
    options: ServiceOptions, byte_tokenizer: Tokenizer, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(FakeEngine(), replace(options, key_hashes=frozenset({digest_of("old")})), byte_tokenizer) as server:

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return server.http.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code

        assert (status("old"), status("sk-carl")) == (200, 401)
        server.service.change_keys(**key_options(read_settings({"keys_file": str(file)})))
        assert (status("old"), status("sk-carl")) == (401, 200)
        tenant = server.engine.submitted[-1].tenant
        assert (tenant.name, tenant.weight, tenant.max_running) == (owner_of(digest_of("sk-carl")), 3, 2)
        assert status("sk-carl") == 429, "one request a minute is its own limit"
        server.wait_until(lambda: "rate_limit_exceeded" in caplog.text)
        assert "carl" in caplog.text
        assert "first_token_ms" in caplog.text
        assert "sk-carl" not in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_keys_are_read_again_on_sighup(tmp_path: Path, file: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    with running(model, tmp_path / "states", "--keys-file", str(file)) as server:
        assert server.refused("GET", "/v1/models", key="sk-dora")[0] == 401
        file.write_text('[[keys]]\nname = "dora"\nkey = "sk-dora"\n')
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.http.get("/v1/models", headers={"authorization": "Bearer sk-dora"}).status_code == 200)
        assert server.get("/v1/models", key=ANN)["data"], "the others stay"
        assert server.refused("GET", "/v1/models", key="sk-carl")[0] == 401
