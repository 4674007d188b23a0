"""What the GPU benchmarks share: their options, cases that may fail, lines that are kept as they come, the results.

No HTTP package is needed.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

from benchmarks import plots
from benchmarks.gpu.models import ATTENTION, SHAPES
from benchmarks.gpu.timing import Ceilings

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Line:
    """One contender in one case.

    Attributes:
        shape: the model's.
        name: the contender's.
    """

    shape: str
    name: str

    def told(self) -> list[str]:
        """Columns of its line of the table, after the name."""
        return []


AnyLine = TypeVar("AnyLine", bound=Line)
Found = TypeVar("Found")


@dataclass(slots=True)
class Journal(Generic[AnyLine]):
    """The lines of a run: each is printed and put away at once, so that a run that is cut off loses none.

    Attributes:
        benchmark: its name.
        path: each line is appended there as JSON; None: they are only printed.
        until: `time.monotonic()` after which no case is begun.
    """

    benchmark: str
    path: Path | None
    until: float
    lines: list[AnyLine] = field(default_factory=list)
    num_left_out: int = 0

    @classmethod
    def of(cls, benchmark: str, arguments: argparse.Namespace) -> "Journal[AnyLine]":
        """By the options of `parser_of`."""
        return cls(benchmark, arguments.lines, time.monotonic() + 60 * arguments.minutes)

    def may_begin(self) -> bool:
        """Whether there is time for one more case; counts those that there was none for."""
        if time.monotonic() < self.until:
            return True
        self.num_left_out += 1
        return False

    def add(self, line: AnyLine) -> None:
        """Tells a line and keeps it."""
        self.lines.append(line)
        print("  ".join([f"{line.shape:14}", f"{line.name:26}", *line.told()]), flush=True)
        self.note(asdict(line))

    def note(self, found: Mapping[str, object]) -> None:
        """Keeps something else that was found."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"benchmark": self.benchmark, **found}) + "\n")


def attempt(work: Callable[[], Found]) -> tuple[Found | None, str | None]:
    """What work returns, or why it failed: a case that fails must not end the others. Gives its memory back."""
    found, failure = None, None
    try:
        found = work()
    except torch.cuda.OutOfMemoryError:
        failure = OUT_OF_MEMORY
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"[:500]
    try:
        _clean_up()
    except RuntimeError as error:  # after a fault of the device every later call fails too; the first says what it was
        found, failure = None, failure or f"{type(error).__name__}: {error}"[:500]
    return found, failure


def _clean_up() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def numbers(text: str) -> list[int]:
    """1,2,3 -> [1, 2, 3]."""
    return [int(one) for one in text.split(",")]


def names(text: str) -> list[str]:
    """a,b -> ["a", "b"]."""
    return text.split(",")


def parser_of(description: str, *, num_rounds: int) -> argparse.ArgumentParser:
    """The options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", type=names, default=["smollm2-135m", "pythia-2.8b"])
    parser.add_argument("--attention", type=names, default=["pure", "hybrid"])
    parser.add_argument("--rounds", type=int, default=num_rounds)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-hf", dest="hf", action="store_false")
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no case after so many")
    parser.add_argument("--lines", type=Path, help="append each line to this file at once, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: whether everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    return parser


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, tiny: Mapping[str, object]
) -> argparse.Namespace:
    """Checked arguments; `tiny` says what takes the place of the cases where `--tiny` is given."""
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        shape = "tiny-neox" if "released" in arguments.attention else "tiny"
        for name, value in {"shapes": [shape], "device": "cpu", "rounds": 1, **tiny}.items():
            setattr(arguments, name, value)
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    unknown += [name for name in arguments.attention if name not in ATTENTION]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; shapes are {', '.join(SHAPES)}, attention {', '.join(ATTENTION)}")
    return arguments


def dtype_of(device: str) -> torch.dtype:
    """Of the weights: bf16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def introduce(most: Ceilings) -> None:
    """Says what the floors are made of."""
    print(f"{most.name}: copy {most.copy_gb_s:,.0f} GB/s, products {most.matrix_tflop_s:,.1f} TFLOP/s", flush=True)


def finish(
    journal: Journal[AnyLine],
    arguments: argparse.Namespace,
    most: Ceilings,
    more: Mapping[str, object],
    files: Sequence[str],
) -> None:
    """Writes the results and prints them as the last line."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": journal.benchmark,
        "ceilings": asdict(most),
        "lines": [asdict(line) for line in journal.lines],
        "left_out": journal.num_left_out,
        **more,
        "plots": list(files),
    }
    name = f"{journal.benchmark}-{most.name.lower().replace(' ', '-')}-{'-'.join(arguments.shapes)}.json"
    (arguments.out / name).write_text(json.dumps(result, indent=1))
    if journal.num_left_out > 0:
        print(f"{journal.num_left_out} cases were left out: time is up")
    print(json.dumps(result))


def draw(
    arguments: argparse.Namespace,
    path: str,
    *,
    title: str,
    x_label: str,
    x: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
) -> list[str]:
    """One PNG of tokens/s; its name, or nothing where plots are not wanted or matplotlib is not there."""
    if not arguments.plots or not plots.is_available():
        return []
    arguments.out.mkdir(parents=True, exist_ok=True)
    plots.lines(arguments.out / path, title=title, x_label=x_label, x=x, panels={"tokens/s": series})
    return [path]
