"""Everything that a first session with a GPU wants to know, the most important first, within a number of minutes.

    python -m benchmarks.gpu_all --minutes 9 --out results

Runs tests and benchmarks one after the other, each in a process of its own: what breaks one, a CUDA error say, leaves
the others alone. Nothing is lost when time is up or the whole is killed: each line of a benchmark goes into
`gpu-session.jsonl` as soon as it is measured, all that is printed into `gpu-session.log`, and each stage adds what
became of it. `--stages` names some of them, for a second call. Needs torch, triton, transformers and pytest; compares
with flash-linear-attention where that can be imported. `--tiny` tries every stage on a CPU. Ends with one line of JSON,
and with status 1 if some stage failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

LAST_LINES = 6
MAX_WORKERS = 8
SPARE_S = 15.0
"""Of a stage's time: a case that has begun may take it up before the stage is killed."""
LEAST_S = 20.0
"""With less time than this left no stage is begun."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One process.

    Attributes:
        name: for `--stages`.
        module, arguments: as for `python -m`.
        share: of the time that is left when it begins, so much at most.
        keeps_lines: whether it takes `--lines`, `--minutes` and `--out`, as our benchmarks do.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    share: float
    keeps_lines: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stage: `passed`, `failed`, `out of time` or `left out`; its last lines."""

    stage: str
    status: str
    seconds: float
    said: tuple[str, ...] = ()


def _tests(name: str, share: float, *paths: str) -> Stage:
    # Warnings of another version of torch or Triton are no failures here; a kernel may take long to compile. Each test
    # is told as it ends: of a stage that is out of time it must be known how far it came.
    options = ("-v", "-rfEs", "-p", "no:cacheprovider", "-W", "default", "-o", "addopts=", "-m", "cuda")
    return Stage(name, "pytest", (*options, *workers(os.cpu_count() or 1), *paths), share, keeps_lines=False)


def workers(num_cores: int) -> tuple[str, ...]:
    """Options for tests in several processes, where xdist is there: most of their time goes into compiling."""
    if num_cores < 4 or find_spec("xdist") is None:
        return ()
    return ("-p", "tests.cuda_faults", "-n", str(min(MAX_WORKERS, num_cores // 2)))


def _decode(name: str, share: float, *arguments: str) -> Stage:
    return Stage(name, "benchmarks.gpu.decode", ("--no-plots", *arguments), share)


def _prefill(name: str, share: float, *arguments: str) -> Stage:
    return Stage(name, "benchmarks.gpu.prefill", ("--no-plots", *arguments), share)


STAGES = (
    _tests(
        "kernels", 0.4,
        *(f"tests/dijiang_model/ops/triton/test_triton_{name}.py"
          for name in ("gpu", "around", "attention", "drawing", "int8_windows", "anchored_prefill")),
    ),
    _tests("graphs", 0.2, "tests/server/engine/fast_steps/test_graphs_cuda.py"),
    _decode(
        "decode-pythia", 0.5, "--shapes", "pythia-2.8b", "--attention", "released", "--contexts", "2048,8192",
        "--batches", "16,1,64,256",
    ),
    _prefill("prefill-llama", 0.5, "--shapes", "llama-2-7b", "--attention", "pure", "--lengths", "2048,8192,32768"),
    _decode("decode-llama", 0.5, "--shapes", "llama-2-7b", "--attention", "pure,hybrid", "--no-hf",
            "--batches", "1,16,64,256"),
    _decode("decode-smollm2", 0.5, "--shapes", "smollm2-135m", "--attention", "anchors,hybrid",
            "--contexts", "2048,8192"),
    Stage("sampling", "benchmarks.gpu.sampling", ("--no-plots",), 0.4),
    _decode("decode-states", 0.5, "--shapes", "smollm2-135m,llama-2-7b", "--attention", "hybrid", "--no-hf",
            "--states", "float32,int8,bfloat16", "--batches", "256,16"),
    _decode("decode-rounded", 0.5, "--shapes", "llama-2-7b,smollm2-135m", "--attention", "pure", "--no-hf",
            "--weights", "plain,int8,int4,int4-minimums", "--batches", "1,16,64"),
    _prefill("prefill-small", 0.5, "--shapes", "pythia-2.8b,smollm2-135m", "--attention", "hybrid"),
    _decode("compiled", 0.6, "--shapes", "pythia-2.8b", "--attention", "released", "--batches", "1,16",
            "--contexts", "2048", "--compile"),
    _tests("engine", 0.9, "tests/server/engine/test_engine_cuda.py",
           "tests/dijiang_model/conversion/training/test_train_cuda.py"),
)  # fmt: skip
"""The most important first."""


class Session:
    """The stages of one call, and where what they find goes."""

    def __init__(self, out: Path, minutes: float, *, is_tiny: bool) -> None:
        """Appends to what is in the folder already."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.is_tiny = out, is_tiny
        self.lines = out / "gpu-session.jsonl"
        self._until = time.monotonic() + 60 * minutes
        self._log = out / "gpu-session.log"

    def run(self, stages: Sequence[Stage]) -> list[Outcome]:
        """All stages that there is time for; their outcomes are kept as they come."""
        outcomes = []
        for stage in stages:
            left_s = self._until - time.monotonic()
            # The last one may use it all up.
            limit_s = left_s if stage is stages[-1] else left_s * stage.share
            outcome = self._run(stage, limit_s) if left_s >= LEAST_S else Outcome(stage.name, "left out", 0.0)
            outcomes.append(outcome)
            self._tell(f"== {stage.name}: {outcome.status}, {outcome.seconds:.0f} s")
            with self.lines.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        return outcomes

    def command(self, stage: Stage, limit_s: float) -> list[str]:
        """As it is run: benchmarks stop by themselves a little before their time is over."""
        command = [sys.executable, "-m", stage.module, *stage.arguments]
        if stage.keeps_lines:
            minutes = max(limit_s - SPARE_S, limit_s / 2) / 60
            command += ["--lines", str(self.lines), "--out", str(self.out), "--minutes", f"{minutes:.3f}"]
            command += ["--tiny"] if self.is_tiny else []
        return command

    def _run(self, stage: Stage, limit_s: float) -> Outcome:
        self._tell(f"== {stage.name}, at most {limit_s:.0f} s")
        began, is_late = time.monotonic(), threading.Event()
        with subprocess.Popen(
            self.command(stage, limit_s),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(stage),
            start_new_session=True,  # so that its compilers end with it
        ) as process:
            timer = threading.Timer(limit_s, _end, (process, is_late))
            timer.start()
            try:
                assert process.stdout is not None
                said = self._copy(process.stdout)
                status = process.wait()
            finally:
                timer.cancel()
                if process.poll() is None:
                    _end(process, is_late)
        name = "out of time" if is_late.is_set() else "passed" if status == 0 else "failed"
        return Outcome(stage.name, name, time.monotonic() - began, tuple(said))

    def _copy(self, output: IO[str]) -> list[str]:
        """Tells every line at once; the last ones that are no JSON."""
        said: list[str] = []
        for line in output:
            if not line.startswith("{"):
                self._tell(line.rstrip())
                said = [*said, line.rstrip()[:300]][-LAST_LINES:]
        return said

    def _tell(self, line: str) -> None:
        print(line, flush=True)
        with self._log.open("a") as file:
            print(line, file=file)


def environment(stage: Stage) -> dict[str, str]:
    """Of a stage's process; workers of tests do not each take all cores for what they compute on the CPU."""
    threads = {"OMP_NUM_THREADS": "2"} if "-n" in stage.arguments else {}
    return {**threads, **os.environ, "PYTHONUNBUFFERED": "1"}


def _end(process: "subprocess.Popen[str]", is_late: threading.Event) -> None:
    is_late.set()
    os.killpg(process.pid, signal.SIGKILL)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A first session with a GPU.")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=[stage.name for stage in STAGES])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: whether everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.stages) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; stages are {', '.join(stage.name for stage in STAGES)}")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny tries everything on a CPU")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages in order; 1 if some failed."""
    arguments = arguments_of(argv)
    session = Session(arguments.out, arguments.minutes, is_tiny=arguments.tiny)
    outcomes = session.run([stage for stage in STAGES if stage.name in arguments.stages])
    print(json.dumps({"benchmark": "gpu-session", "stages": [asdict(one) for one in outcomes]}))
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
