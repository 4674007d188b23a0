"""`dijiang doctor`: what this machine offers, what is wrong, and what to type."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from dijiang_model.program import program

if TYPE_CHECKING:
    from server.startup.examination import Finding

_SIGNS = {"ok": ("✓", "green"), "notice": ("!", "yellow"), "problem": ("✗", "red")}


def doctor_command(
    model: Annotated[Path | None, typer.Argument(help="A model's folder to look at, too.")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Where models and states are kept.")] = Path("~/.cache/dijiang"),
    host: Annotated[str, typer.Option(help="Address at which a server would listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Say what machine, devices, kernels, models and caches there are, what is wrong with them, and what to type.

    Exit status 1: a server would not start, or be several times slower than it could; 0: all is well. Changes nothing.
    """
    # Imported late: `--help` needs nothing of torch.
    from server.startup.examination import Place, examine

    home = Path(os.environ.get("DIJIANG_CACHE_DIR", cache_dir)).expanduser()
    place = Place(home, _hub_cache(), host, port, None if model is None else model.expanduser())
    findings, console = [], Console(highlight=False)
    for finding in examine(place):
        findings.append(finding)
        if not as_json:
            console.print(_line(finding), soft_wrap=True)
    problems = [finding for finding in findings if _level(finding) == "problem"]
    if as_json:
        document = {"ok": not problems, "findings": [{"level": _level(one), **asdict(one)} for one in findings]}
        typer.echo(json.dumps(document, indent=2))
    elif problems:
        count = len(problems)
        console.print(f"\n{count} {'problem' if count == 1 else 'problems'}: see what to type above")
    else:
        console.print(f"\nall is well: {program()} serve")
    if problems:
        raise typer.Exit(1)


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _level(finding: "Finding") -> str:
    if finding.problem is None:
        return "ok"
    return "problem" if finding.is_serious else "notice"


def _line(finding: "Finding") -> Text:
    sign, style = _SIGNS[_level(finding)]
    line = Text.assemble((sign, style), " ", (finding.name, "bold"), f": {finding.found}")
    if finding.problem is not None:
        line.append(f"\n  {finding.problem}", style)
        line.append(f"\n  -> {finding.remedy}")
    return line
