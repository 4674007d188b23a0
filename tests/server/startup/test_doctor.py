"""`dijiang doctor` finds what is there, says what is wrong and what to type, and its exit status says whether it is."""

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from dijiang_model.native import library
from server.cli import app
from server.startup import examination
from server.startup.examination import Finding, Place, examine
from server.states.files.local import INDEX_FILE
from tests.ports import free_port
from tests.tiny_models import write_tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(examination, "free_cuda_bytes", list)
    monkeypatch.setattr(examination, "CUDA_DEVICE_FILES", ())
    (tmp_path / "home").mkdir()
    return Place(tmp_path / "home", tmp_path / "hub", "127.0.0.1", free_port(), variables={"PATH": ""})


def found(place: Place, name: str) -> Finding:
    return next(finding for finding in examine(place) if finding.name == name)


def test_nothing_is_changed(place: Place) -> None:
    list(examine(replace(place, home=place.home / "not" / "there")))
    assert list(place.home.iterdir()) == []


def test_the_machine_and_the_kernels_are_named(place: Place) -> None:
    findings = {finding.name: finding for finding in examine(place)}
    assert {
        "program",
        "machine",
        "devices",
        "kernels on the CPU",
        "models",
        "hub cache",
        "disk",
        "address",
    } <= findings.keys()
    assert "cores" in findings["machine"].found
    used = next((variant for variant, why in library.variants_in_words().items() if why == "used"), "none")
    assert findings["kernels on the CPU"].found.startswith(used)
    assert "is made when it is first served" in findings["models"].found
    assert findings["address"].found.endswith("is free")
    assert findings["command"].remedy is not None


@pytest.mark.parametrize(
    ("words", "is_serious", "problem"),
    [
        ({"avx2": "this CPU lacks f16c", "base": "used"}, False, None),
        ({"avx2": "not compiled", "base": "used"}, False, "avx2 would be faster, but not compiled"),
        ({"avx2": "this CPU lacks f16c", "base": "built from other sources"}, True, "built from other sources"),
    ],
)
def test_kernels_that_are_missing_are_a_problem(
    words: dict[str, str], is_serious: bool, problem: str | None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "variants_in_words", lambda: words)
    monkeypatch.setattr(library, "why_missing", lambda: "they were built from other sources")
    finding = found(place, "kernels on the CPU")
    assert (finding.is_serious, finding.remedy) == (is_serious, "make kernels")
    assert finding.problem is problem is None or (problem or "") in (finding.problem or "")


def test_variants_say_why_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_processor_flags", frozenset)
    monkeypatch.setattr(library, "load_library", library.load_library.__wrapped__)
    words = library.variants_in_words()
    assert words["avx2"] == "this CPU lacks avx2, bmi2, f16c, fma"
    assert words["base"] in ("used", "not compiled", "built from other sources")


def test_a_device_that_torch_cannot_use_is_a_problem(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "CUDA_DEVICE_FILES", (str(place.home),))
    assert "can use no CUDA device" in (found(place, "devices").problem or "")
    monkeypatch.setattr(examination, "free_cuda_bytes", lambda: [2**30, 2**31])
    assert found(place, "devices").found == "cuda:0, 1.0 GiB free; cuda:1, 2.0 GiB free"


def test_models_are_listed_and_broken_ones_named(place: Place) -> None:
    good = write_tiny_model(place.home / "models" / "good")
    broken = write_tiny_model(place.home / "models" / "broken")
    (broken / "model.safetensors").unlink()
    raw = place.home / "raw"
    raw.mkdir()
    (raw / "config.json").write_text('{"model_type": "qwen2"}')
    assert "a conversation" in found(place, "model good").found
    assert found(place, "model good").problem is None
    finding = found(place, "model broken")
    assert "neither model.safetensors" in (finding.problem or "")
    assert f"SOURCE {broken} --overwrite" in (finding.remedy or "")
    assert found(replace(place, model=raw), "model raw").remedy == f"dijiang convert {raw} OUT"
    assert "holds no config.json" in (found(replace(place, model=place.home / "no"), "model no").problem or "")
    (good / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    assert "cannot be served" in (found(place, "model good").problem or "")


def test_what_the_hub_cache_offers_is_named(place: Place) -> None:
    for name, kind in (("Owner--Seven", "qwen2"), ("other--vision", "clip")):
        folder = place.hub / f"models--{name}" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    finding = found(place, "hub cache")
    assert "Owner/Seven" in finding.found
    assert "vision" not in finding.found


def test_states_without_their_index_are_a_problem(place: Place) -> None:
    folder = place.home / "states" / "mine"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"state")
    finding = found(place, "states of mine")
    assert finding.remedy == f"dijiang state repair {folder}"
    assert INDEX_FILE in (finding.problem or "")
    (folder / INDEX_FILE).write_bytes(b"")
    assert found(place, "states of mine").problem is None


def test_settings_that_a_server_would_refuse_are_a_problem(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIJIANG_PROT", "80")
    assert "did you mean DIJIANG_PORT?" in (found(place, "settings").problem or "")


@pytest.fixture
def listening() -> Iterator[HTTPServer]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.body)  # type: ignore[attr-defined]

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_whoever_has_the_port_is_named(place: Place, listening: HTTPServer) -> None:
    place = replace(place, port=listening.server_port)
    listening.body = b'{"data": [{"id": "smol"}]}'  # type: ignore[attr-defined]
    assert "a server with smol answers" in found(place, "address").found
    assert found(place, "address").problem is None
    listening.body = b"hello"  # type: ignore[attr-defined]
    assert found(place, "address").remedy == f"--port {place.port + 1}"


def test_the_command_prints_it_and_its_status_says_whether_something_is_wrong(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "variants_in_words", lambda: {"base": "used"})
    monkeypatch.setenv("HF_HUB_CACHE", str(place.hub))
    options = ["doctor", "--cache-dir", str(place.home), "--port"]
    good = CliRunner().invoke(app, [*options, str(place.port)])
    assert good.exit_code == 0, good.output
    assert "all is well" in good.stdout
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(examination, "ANSWER_TIMEOUT_S", 0.2)
        bad = CliRunner().invoke(app, [*options, str(port)])
        document = json.loads(CliRunner().invoke(app, [*options, str(port), "--json"]).stdout)
    assert bad.exit_code == 1
    assert f"-> --port {port + 1}" in bad.stdout
    assert not document["ok"]
    assert [one["name"] for one in document["findings"] if one["level"] == "problem"] == ["address"]
