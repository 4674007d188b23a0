"""`dijiang evaluate`: the command line of the evaluation."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from dijiang_model.conversion.cli import parse_size
from dijiang_model.conversion.evaluation.wanted import LONG_TOKENS, Measurements, Rounding
from dijiang_model.errors import ModelError

Facts = Annotated[
    int,
    typer.Option(
        min=0,
        help="Chats of 2,048 tokens with facts to recall, as many with facts in their first turn alone, a quarter "
        "of 4,096 tokens and an eighth of 8,192; 0: none.",
    ),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(help="Of a calibrated model: also with states of so many bytes, e.g. 4.4MB. Again for a curve."),
]
Also = Annotated[
    list[Path] | None,
    typer.Option(help="Another conversion of the teacher, with a state of another size. Again for a curve."),
]
Rounded = Annotated[
    list[str] | None,
    typer.Option(help="Also in fewer bits: int8 or int4 weights, bfloat16-state, int8-state. Again for more."),
]
Ablations = Annotated[
    bool, typer.Option("--ablations/--no-ablations", help="Also with parts of the model switched off.")
]


def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model.")],
    teacher: Annotated[Path, typer.Option(help="What it was made from: HF folder, GGUF file or untrained conversion.")],
    text: Annotated[list[Path], typer.Option(help="Held-out text, as for `train --data`. Again for more.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json, tables.md and plots.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to merge into MODEL first.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="Adapter or model trained with `train --no-linear`: the window alone.")
    ] = None,
    rounded: Rounded = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each file, spread over it.")] = 8,
    length: Annotated[int, typer.Option(min=66, help="Tokens of a window.")] = 2048,
    facts: Facts = 4,
    ablations: Ablations = True,
    state_bytes: Budgets = None,
    also: Also = None,
    long: Annotated[int, typer.Option(min=0, help=f"Texts of {LONG_TOKENS:,} tokens to read in one go; 0: none.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Measure what a conversion lost, and what its linear part brings."""
    # Imported late, as in `convert_command`.
    import torch

    from dijiang_model.checkpoints.outputs import output_folder
    from dijiang_model.conversion.evaluation import report, run
    from dijiang_model.conversion.training.chat_prompt import load_chat_template, plain_chat
    from dijiang_model.conversion.training.text_windows import load_tokenizer

    console = Console(stderr=True)
    if threads > 0:
        torch.set_num_threads(threads)
    kinds = tuple(kind for kind in get_args(Rounding) if kind in (rounded or ()))
    if unknown := set(rounded or ()) - set(kinds):
        raise typer.BadParameter(f"{min(unknown)!r} is none of {', '.join(get_args(Rounding))}", param_hint="--rounded")
    budgets = tuple(sorted(parse_size(size, "--state-bytes") for size in state_bytes or ()))
    wanted = Measurements(windows, length, facts, long, kinds, budgets, ablations)
    try:
        inputs = [model, teacher, *text, *(also or ()), *(path for path in (adapter, control) if path is not None)]
        report.check_report_folder(output_folder(out, inputs=inputs))
        evaluation = run.evaluate(
            run.load_subjects(model, teacher, adapter=adapter, control=control, also=also or (), device=device),
            text,
            load_tokenizer(model),
            wanted,
            console=console,
            render=load_chat_template(model) or plain_chat,
        )
        report.write_report(evaluation, out)
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    console.print(Markdown(report.card_table(evaluation)))
    typer.echo(report.json_line(evaluation))
