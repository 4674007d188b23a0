"""The figure of kept results: which numbers it shows, and that it refuses to mix machines."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks import figure


def line(name: str, rows: int, context: int, ms: float) -> dict[str, Any]:
    return {
        "name": name,
        "num_rows": rows,
        "context": context,
        "median_ms": ms,
        "tokens_per_s": rows / ms * 1e3,
        "conversation_mib": 4.0,
    }


LINES = [
    line("ours fp32", 1, 128, 20.0),
    line("ours fp32", 1, 4096, 21.0),
    line("ours int8", 16, 2048, 30.0),
    line("HF dynamic", 1, 128, 70.0),
    line("HF static", 1, 128, 60.0),
    line("llama.cpp Q4_1", 1, 128, 10.0),
]


def write(folder: Path, lines: list[dict[str, Any]], *, threads: int = 2) -> Path:
    machine = {"processor": "a processor", "num_threads": threads}
    path = folder / f"decode-{threads}-{len(lines)}.json"
    path.write_text(json.dumps({"machine": machine, "model": "tiny", "date": "2026-11-23", "lines": lines}))
    return path


def test_of_hf_the_fastest_is_shown_and_what_is_of_no_class_is_not() -> None:
    curves = figure.curves_of(LINES, by="context", value="median_ms", fixed={"num_rows": 1})
    assert curves == {"DiJiang fp32": {128: 20.0, 4096: 21.0}, figure.FASTEST_HF: {128: 60.0}}
    curves = figure.curves_of(LINES, by="num_rows", value="tokens_per_s", fixed={"context": 2048})
    assert curves == {"DiJiang int8": {16: pytest.approx(533.3, rel=1e-3)}}


def run(*arguments: object) -> Result:
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(figure.main)
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


def test_results_become_a_small_png_and_a_line_of_json(tmp_path: Path) -> None:
    results = [write(tmp_path, LINES), write(tmp_path, LINES[:2])]
    out = tmp_path / "figure.png"
    done = run(*results, "--out", out)
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    assert out.stat().st_size < 150_000
    assert json.loads(done.stdout.splitlines()[-1])["results"] == [result.name for result in results]


def test_results_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    done = run(write(tmp_path, LINES), write(tmp_path, LINES, threads=1), "--out", tmp_path / "figure.png")
    assert done.exit_code == 2
    assert "2 machines" in done.output
