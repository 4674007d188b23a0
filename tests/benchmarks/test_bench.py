"""`dijiang bench` as it is typed, each command at its smallest."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from benchmarks import llama_cpp, machine, rivals
from dijiang_model.conversion.quantize import quantize_folder
from server.cli import app
from tests.tiny_models import write_tiny_model

PNG = b"\x89PNG\r\n"
HF_WAYS = ("HF fp32 dynamic", "HF fp32 static", "HF bf16 dynamic", "HF bf16 static")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(autouse=True)
def _small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(machine, "MATRIX", {"cpu": 32})


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def found(result: Result) -> dict[str, Any]:
    """The last line of the output."""
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert document["machine"]["read_gb_s"] > 0
    assert document["machine"]["matrix_gflop_s"] > 0
    return document


def test_decode_measures_ours_and_hf_in_every_case_and_says_how_far_from_the_floor(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "decode.png"
    result = bench("decode", model, "--cases", "1:8,3:5", "--rounds", 2, "--threads", 1, "--flat", "--plot", plot)
    lines = found(result)["lines"]
    assert [(line["name"], line["num_rows"], line["context"]) for line in lines] == [
        (name, *case) for case in ((1, 8), (3, 5)) for name in ("ours fp32", "ours int8", *HF_WAYS)
    ]
    for line in lines:
        assert line["best_ms"] <= line["median_ms"]
        assert line["tokens_per_s"] == pytest.approx(line["num_rows"] / line["median_ms"] * 1e3)
        if line["name"].startswith("ours"):
            assert line["times_hf"] > 0
            assert (line["times_hf"] == line["times_hf_fp32"]) == (line["name"] == "ours fp32")
            assert line["times_floor"] == pytest.approx(line["best_ms"] / line["floor_ms"])
    assert plot.read_bytes().startswith(PNG)
    assert "x floor" in result.stdout


def test_continuous_batching_of_hf_is_timed_by_its_own_account(model: Path) -> None:
    arguments = ("--cases", "3:20", "--rounds", 2, "--threads", 1, "--weights", "fp32", "--rivals", "hf-continuous")
    ours, theirs = found(bench("decode", model, *arguments))["lines"]
    assert (theirs["name"], theirs["num_rows"], theirs["context"]) == ("HF fp32 continuous", 3, 20)
    assert theirs["median_ms"] > 0
    assert ours["times_hf"] > 0


def test_a_rival_that_cannot_be_measured_is_left_out_in_words(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCompiler:
        def __init__(self, twin: Any) -> None:
            self.config, self.device, self.dtype = twin.config, twin.device, twin.dtype

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(rivals, "Compiled", NoCompiler)
    arguments = ("--cases", "1:8", "--rounds", 1, "--threads", 1, "--weights", "fp32", "--rivals", "hf-compiled,hf")
    document = found(bench("decode", model, *arguments))
    assert [line["name"] for line in document["lines"]] == ["ours fp32", "HF fp32 dynamic", "HF fp32 static"]
    assert document["notes"] == ["Without HF's compiled static cache at 1 x 8: RuntimeError: no compiler"]


def test_caches_that_do_not_fit_in_memory_are_left_out_in_words(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "SHARE_OF_MEMORY", 0.0)
    document = found(bench("decode", model, "--cases", "1:8", "--rounds", 1, "--threads", 1))
    assert [line["name"] for line in document["lines"]] == ["ours fp32", "ours int8"]
    assert "Without HF at 1 x 8" in document["notes"][0]


def test_weights_that_are_stored_rounded_are_measured_as_they_are(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    quantize_folder(model, folder, kind="int8")
    small = ("--cases", "1:8", "--rounds", 1, "--threads", 1)
    document = found(bench("decode", folder, *small, "--weights", "int8"))
    assert [line["name"] for line in document["lines"]] == ["ours int8"]
    assert document["notes"] == ["Without HF: it needs the weights before they were rounded to int8."]
    refused = bench("decode", folder, *small)
    assert refused.exit_code == 1
    assert "are stored in int8, so there is no fp32 to measure; pass --weights int8" in refused.output


def test_what_takes_too_long_is_given_up() -> None:
    with pytest.raises(rivals.TooLongError, match=r"after 0\.01 s"), rivals.time_limit(0.01):
        Event().wait()
    with rivals.time_limit(60):
        pass


def test_prefill_measures_prompts_alone_and_together(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "prefill.png"
    result = bench(
        "prefill", model, "--lengths", "5,9", "--ragged", "3,7", "--rounds", 1, "--threads", 1, "--plot", plot
    )
    lines = found(result)["lines"]
    assert [line["lengths"] for line in lines[::4]] == [[5], [9], [3, 7]]
    assert {line["name"] for line in lines} == {"ours fp32", "ours int8", "HF fp32 sdpa", "HF bf16 sdpa"}
    alone, together = lines[0], lines[8]
    assert together["operations"] > alone["operations"]
    assert plot.read_bytes().startswith(PNG)


def test_prompts_are_read_beside_llama_cpp(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Silent:
        def __init__(self, file: Path, *, lengths: list[int], num_threads: int) -> None:
            assert file in (source, tmp_path / "Q8_0.gguf")
            assert (lengths, num_threads) == ([5], 1)

        def __call__(self) -> None:
            pass

    source = tmp_path / "model.Q4_1.gguf"
    monkeypatch.setattr(llama_cpp, "is_available", lambda: True)
    monkeypatch.setattr(llama_cpp, "requantised", lambda source, target, kind, num_threads: tmp_path / target.name)
    monkeypatch.setattr(llama_cpp, "Prompts", Silent)
    arguments = ("--lengths", "5", "--ragged", "", "--rounds", 1, "--threads", 1, "--weights", "int8")
    lines = found(bench("prefill", model, *arguments, "--rivals", "llama.cpp", "--gguf", source))["lines"]
    assert [line["name"] for line in lines] == ["ours int8", "llama.cpp Q8_0", "llama.cpp Q4_1"]
    assert lines[0]["times_hf"] is None
    assert lines[0]["times_llama_cpp"] > 0


def test_train_measures_both_stages(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "train.png"
    lines = found(bench("train", model, "--length", 16, "--steps", 1, "--threads", 1, "--plot", plot))["lines"]
    assert [line["stage"] for line in lines] == [1, 2]
    assert all(line["tokens_per_s"] > 0 and line["peak_mib"] > 0 for line in lines)
    assert lines[1]["operations"] > 3 * lines[0]["operations"]
    assert plot.read_bytes().startswith(PNG)


def test_serve_starts_a_server_and_measures_it_over_its_socket(model: Path, tmp_path: Path) -> None:
    plot = tmp_path / "serve.png"
    result = bench(
        *("serve", model, "--clients", "1,3", "--prompt-tokens", 4, "--tokens", 40, "--requests", 2),
        *("--threads", 1, "--plot", plot),
    )
    document = found(result)
    assert document["model_step_ms"] > 0
    assert [(line["num_clients"], line["num_tokens"]) for line in document["lines"]] == [(1, 80), (3, 240)]
    for line in document["lines"]:
        assert line["engine_step_ms"] > 0
        assert line["floor_ms"] > 0
        assert 0 < line["first_token_ms"]["p50"] <= line["first_token_ms"]["p99"]
        assert 0 < line["between_tokens_ms"]["p50"] <= line["between_tokens_ms"]["p99"]
    assert document["lines"][0]["service_share"] < 1
    assert plot.read_bytes().startswith(PNG)


def test_only_the_line_of_json_is_printed_and_kept_on_request(model: Path, tmp_path: Path) -> None:
    result = bench(
        *("decode", model, "--cases", "1:4", "--rounds", 1, "--rivals", "", "--weights", "fp32", "--threads", 1),
        *("--json", "--save", tmp_path / "kept"),
    )
    document = found(result)
    assert len(result.stdout.splitlines()) == 1
    (file,) = (tmp_path / "kept").iterdir()
    assert json.loads(file.read_text()) == document
    assert [line["times_hf"] for line in document["lines"]] == [None]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("decode", "--cases", "1x128"), "ROWS:CONTEXT"),
        (("decode", "--rivals", "vllm"), "none of hf, hf-compiled, hf-continuous, llama.cpp"),
        (("decode", "--weights", "fp31"), "none of fp32"),
        (("prefill", "--weights", ""), "at least one of fp32"),
        (("prefill", "--rivals", "hf-compiled"), "none of hf, llama.cpp"),
        (("train", "--stages", ""), "at least one stage"),
        (("serve", "--weights", "fp32,int8"), "none of fp32"),
        (("decode", "--threads", "2", "--clock", "cpu"), "--threads 1"),
        (("decode", "--clock", "sun"), "none of wall, cpu"),
        (("prefill", "--lengths", "0"), "numbers from 1 on"),
        (("train", "--stages", "3"), "none of 1, 2"),
        (("serve", "--clients", ""), "numbers from 1 on"),
    ],
)
def test_what_cannot_be_measured_is_said_in_words(arguments: tuple[str, ...], complaint: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", " ").split())


def test_distance_compares_the_same_tokens(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 20)
    result = bench("distance", text, "--model", model, "--span", 8, "--ends", "8,16,64,100000")
    assert result.exit_code == 0, result.output
    first, last = json.loads(result.stdout.splitlines()[-1])["distance"]["rows"]
    assert (first["end"], last["end"]) == (16, 64)
    assert first["far"] == first["near"], "the same is read"
    assert last["far"] != last["near"]
    short = bench("distance", text, "--model", model, "--ends", "100000")
    assert short.exit_code == 1
    assert "no text is as long" in short.output


def test_answers_counts_those_that_are_right_and_end(model: Path) -> None:
    result = bench("answers", model, "--seeds", 3, "--max-tokens", 1, "--answer", "")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout.splitlines()[-1])["answers"]
    assert answers["num_seeds"] == 3
    assert answers["num_good"] == 3 - len(answers["bad"])
    assert f"{answers['num_good']} of 3" in result.stdout


def test_a_folder_without_a_model_and_a_server_that_is_not_there_are_said_in_words(tmp_path: Path) -> None:
    for command in ("decode", "prefill", "train", "serve"):
        result = bench(command, tmp_path, "--threads", 1)
        assert result.exit_code == 1
        assert "config.json" in result.output
    result = bench("serve", "--base-url", "http://127.0.0.1:9", "--threads", 1)
    assert result.exit_code == 1
    assert "127.0.0.1:9" in result.output
