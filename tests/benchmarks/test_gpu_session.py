"""The one command of a GPU session: stages in order, each by itself, and nothing lost when time is up."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_all
from benchmarks.gpu_all import Session, Stage
from tests.waiting import PATIENCE_S, until

KEEPS_A_LINE = """
import sys
path = sys.argv[sys.argv.index("--lines") + 1]
open(path, "a").write('{"ms": 1.5}' + chr(10))
print("measured")
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that stand for benchmarks: one measures, one goes on for ever, one breaks."""
    (tmp_path / "measures.py").write_text(KEEPS_A_LINE)
    (tmp_path / "goes_on.py").write_text(KEEPS_A_LINE + "import signal, sys\nsys.stdout.flush()\nsignal.pause()\n")
    (tmp_path / "breaks.py").write_text("raise SystemExit('CUDA error: an illegal memory access')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def kept(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "gpu-session.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("modules")
def test_a_stage_that_breaks_or_is_cut_off_loses_no_line_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    class Timer:
        """Time is up for the stage that goes on for ever once it has kept its line; for the others never."""

        def __init__(self, _: float, end: Callable[..., None], args: tuple[subprocess.Popen[str], threading.Event]):
            self._end, self._args = end, args

        def start(self) -> None:
            if "goes_on" in self._args[0].args:
                threading.Thread(target=self._wait).start()

        def _wait(self) -> None:
            until(lambda: '"ms"' in (out / "gpu-session.jsonl").read_text())
            self._end(*self._args)

        def cancel(self) -> None:
            """It is never late."""

    monkeypatch.setattr("benchmarks.gpu_all.threading.Timer", Timer)
    stages = [Stage("b", "breaks", (), 0.3), Stage("g", "goes_on", (), 0.3), Stage("m", "measures", (), 0.3)]
    outcomes = Session(out, 60.0, is_tiny=False).run(stages)
    assert [(one.stage, one.status) for one in outcomes] == [("b", "failed"), ("g", "out of time"), ("m", "passed")]
    assert outcomes[0].said == ("CUDA error: an illegal memory access",)
    found = [line.get("stage", line.get("ms")) for line in kept(out)]
    assert found == ["b", 1.5, "g", 1.5, "m"], "in the order in which it happened"
    assert "measured" in (out / "gpu-session.log").read_text()


@pytest.mark.usefixtures("modules")
def test_without_time_stages_are_left_out_and_a_later_call_goes_on_in_the_same_files(tmp_path: Path) -> None:
    out, stage = tmp_path / "out", Stage("m", "measures", (), 0.3)
    assert [one.status for one in Session(out, 0.1, is_tiny=False).run([stage])] == ["left out"]
    assert [one.status for one in Session(out, 60.0, is_tiny=False).run([stage])] == ["passed"]
    assert [line.get("status") for line in kept(out)] == ["left out", None, "passed"]


def test_every_benchmark_is_told_to_end_before_it_is_killed(tmp_path: Path) -> None:
    session = Session(tmp_path, 9, is_tiny=False)
    for stage in gpu_all.STAGES:
        command = session.command(stage, 120.0)
        if stage.keeps_lines:
            assert command[command.index("--minutes") + 1] == "1.750"
            assert command[command.index("--lines") + 1] == str(session.lines)
        else:
            assert command[1:3] == ["-m", "pytest"]
            assert [Path(one).is_file() for one in command if one.startswith("tests/")]


def test_unknown_stages_and_a_missing_device_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_all.main(["--stages", "kernels,decoding"])
    assert "unknown: decoding; stages are kernels, graphs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_runs_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["decode-pythia", "prefill-llama"]
    assert gpu_all.main(["--tiny", "--minutes", "60", "--stages", ",".join(stages), "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["stage"], one["status"]) for one in result["stages"]] == [(name, "passed") for name in stages]
    names = {str(line.get("name")) for line in kept(tmp_path)}
    assert {"ours released, recorded", "ours pure", "HF dynamic", "HF sdpa"} <= names


FAULTS = """
import torch

def test_before(): pass

def test_leaves_a_fault(monkeypatch):
    def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    assert 1 == 2

def test_after():
    assert not torch.cuda.is_available(), "a process of its own"

def test_fails(): assert 3 == 4
"""


def test_a_fault_of_the_device_costs_the_tests_behind_it_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_faults.py").write_text(FAULTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "tests.cuda_faults", "-p", "no:cacheprovider"]
    command += ["-p", "no:randomly", "-n", "1", "-o", "addopts=", "--rootdir", str(tmp_path), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "2 failed, 2 passed" in answer.stdout
    assert "crashed while running 'test_faults.py::test_leaves_a_fault'" in answer.stdout
    assert "left the device unusable: CUDA error: an illegal memory access" in answer.stderr
    assert "assert 1 == 2" in answer.stderr, "what the test itself had to say is not lost"


def test_tests_are_spread_over_the_cores_of_a_large_machine() -> None:
    assert gpu_all.workers(2) == ()
    assert gpu_all.workers(16)[-2:] == ("-n", "8")
    spread = Stage("k", "pytest", gpu_all.workers(16), 0.3, keeps_lines=False)
    assert "OMP_NUM_THREADS" in gpu_all.environment(spread)
