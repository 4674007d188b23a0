"""Options that the commands share, and what becomes of their findings: a table, a plot, a file, one line of JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import plots
from benchmarks.machine import CLOCKS, WEIGHTS, Machine, document, is_cuda, save_document, this_machine
from dijiang_model.errors import ModelError

if TYPE_CHECKING:
    from dijiang_model.model import DiJiangForCausalLM

WIDTH = 140

ModelFolder = Annotated[Path | None, typer.Argument(help="Folder of a DiJiang model; the default model if absent.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of all contenders; torch's choice if absent.")]
Clock = Annotated[str, typer.Option(help="wall, or cpu: this process alone (one thread on a busy machine).")]
OnlyJson = Annotated[bool, typer.Option("--json", help="Print the line of JSON alone.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the result; a PNG (needs matplotlib).")]
Save = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the JSON there, by device and date.")]


@dataclass(slots=True)
class Report:
    """Where a command's findings go.

    Attributes:
        benchmark: its name.
        console: for everything but the line of JSON.
        only_json: print nothing else.
        plot: PNG to write; None: none.
        save: folder for the JSON; None: it is only printed.
        notes: said under the table.
    """

    benchmark: str
    only_json: bool = False
    plot: Path | None = None
    save: Path | None = None
    notes: list[str] = field(default_factory=list)
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        self.console = Console(width=WIDTH, quiet=self.only_json)
        if self.plot is not None and not plots.is_available():
            raise typer.BadParameter(
                "matplotlib is not installed; it comes with `pip install 'dijiang[bench]'`", param_hint="--plot"
            )

    def note(self, text: str) -> None:
        """A sentence for the eye and for the JSON."""
        self.notes.append(text)
        self.console.print(text, markup=False, highlight=False)

    def introduce(self, machine: Machine, text: str = "") -> None:
        """Says what the floors are made of."""
        rates = ", ".join(f"{rate:,.0f} GFLOP/s in {kind}" for kind, rate in machine.matrix_rates.items())
        self.console.print(
            f"{machine.processor}, {machine.num_threads} threads: {machine.read_gb_s:.1f} GB/s read, "
            f"{rates}, load {machine.load_average:.1f}. {text}",
            markup=False,
            highlight=False,
        )

    def finish(
        self, machine: Machine, result: Mapping[str, object], table: Table, draw: Callable[[Path], None]
    ) -> None:
        """Shows the table, then draws, keeps and prints the result."""
        self.console.print(table)
        found = document(self.benchmark, machine, {**result, "notes": self.notes})
        if self.plot is not None:
            draw(self.plot)
            self.console.print(f"plot: {self.plot}", markup=False, highlight=False)
        if self.save is not None:
            self.console.print(f"kept: {save_document(found, self.save, machine)}", markup=False, highlight=False)
        typer.echo(json.dumps(found))


def model_folder(given: Path | None) -> Path:
    """The model to measure.

    Raises:
        typer.Exit: it is not there, after saying so.
    """
    from dijiang_model.conversion.default_model import ensure_default_model

    try:
        return ensure_default_model(is_quantized=False) if given is None else given
    except ModelError as error:
        raise failed(error) from error


def failed(error: object) -> typer.Exit:
    """Says what went wrong; the exit that ends the program."""
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def loaded_models(folder: Path, kinds: Sequence[str], device: str) -> dict[str, "DiJiangForCausalLM"]:
    """A model in several kinds of weights; what is wrong with it ends the program with a sentence."""
    from benchmarks.contenders import load_models

    try:
        return load_models(folder, kinds, device=device)
    except ModelError as error:
        raise failed(error) from error


def prepare(threads: int | None, clock: str, device: str) -> None:
    """Checks what the commands share, and sets the threads.

    Raises:
        typer.BadParameter: a clock that does not exist or would mislead, a device that is not there.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if clock not in CLOCKS:
        raise typer.BadParameter(f"{clock!r} is none of {', '.join(CLOCKS)}", param_hint="--clock")
    if clock == "cpu" and (torch.get_num_threads() != 1 or device != "cpu"):
        raise typer.BadParameter(
            "cpu counts all threads together and no device: give --threads 1", param_hint="--clock"
        )
    if is_cuda(device) and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="--device")


def measured_machine(clock: str, device: str, kinds: Sequence[str] = ("fp32",)) -> Machine:
    """`this_machine`, without the benchmark's clock on a CUDA device."""
    return this_machine("wall" if is_cuda(device) else clock, device=device, kinds=kinds)


def numbers(text: str, flag: str, *, least: int = 1) -> list[int]:
    """`1, 16` -> [1, 16].

    Raises:
        typer.BadParameter: anything but numbers of at least `least`.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers from {least} on, with commas", param_hint=flag)
    return [int(part) for part in parts]


def words(text: str, flag: str, known: Sequence[str]) -> list[str]:
    """`fp32,int8` -> ["fp32", "int8"]; nothing in, nothing out.

    Raises:
        typer.BadParameter: a word that is not among `known`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        word(part, flag, known)
    return parts


def word(text: str, flag: str, known: Sequence[str]) -> str:
    """The word itself.

    Raises:
        typer.BadParameter: it is not among `known`.
    """
    if text not in known:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(known)}", param_hint=flag)
    return text


def kinds_of_weights(text: str | None, device: str) -> list[str]:
    """`fp32,int8` -> ["fp32", "int8"]; those are the default too, on CUDA bf16 alone.

    Raises:
        typer.BadParameter: a kind that there is not, or none at all.
    """
    if text is None:
        return ["bf16"] if is_cuda(device) else ["fp32", "int8"]
    kinds = words(text, "--weights", WEIGHTS)
    if not kinds:
        raise typer.BadParameter(f"name at least one of {', '.join(WEIGHTS)}", param_hint="--weights")
    return kinds
