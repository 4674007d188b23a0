"""`dijiang evaluate`: the command line of the evaluation."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dijiang_model.checkpoints import load_model
from dijiang_model.config_json import read_stored_config
from dijiang_model.conversion.adapters import adapted_model, load_adapter
from dijiang_model.conversion.evaluate import (
    Score,
    Variant,
    gap_closed,
    load_teacher,
    recall_probe,
    score,
    variants,
)
from dijiang_model.conversion.model_card import title
from dijiang_model.conversion.report import Evaluation, card_table, json_line, write_report
from dijiang_model.conversion.student import check_trainable
from dijiang_model.conversion.text_windows import load_tokenizer, load_windows, text_files
from dijiang_model.errors import ModelError


def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a converted model.")],
    teacher: Annotated[Path, typer.Option(help="What it was made from: HF folder, GGUF file or untrained conversion.")],
    text: Annotated[list[Path], typer.Option(help="Held-out UTF-8 text, file or folder. Again for more.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and plots.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to merge into MODEL first.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each file, spread over it.")] = 8,
    length: Annotated[int, typer.Option(min=66, help="Tokens of a window.")] = 2048,
    facts: Annotated[int, typer.Option(min=0, help="Questions of the recall probe for each distance; 0: none.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Measure what a conversion lost, and what its linear part brings."""
    console = Console(stderr=True)
    if threads > 0:
        torch.set_num_threads(threads)
    try:
        evaluation = evaluate(
            model,
            teacher,
            text,
            adapter=adapter,
            num_windows=windows,
            length=length,
            num_facts=facts,
            device=device,
            console=console,
        )
        write_report(evaluation, out)
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    console.print(Markdown(card_table(evaluation)))
    typer.echo(json_line(evaluation))


def evaluate(
    folder: Path,
    teacher_path: Path,
    text: list[Path],
    *,
    adapter: Path | None,
    num_windows: int,
    length: int,
    num_facts: int,
    device: str,
    console: Console,
) -> Evaluation:
    """Measures everything; see `Evaluation`.

    Raises:
        ModelError: anything wrong with the models or the text.
    """
    model, origin = load_model(folder, device=device), read_stored_config(folder).origin
    tokens_trained, training = origin.tokens_trained, origin.recipe
    if adapter is not None:
        loaded = load_adapter(adapter)
        model = adapted_model(model, loaded)
        tokens_trained, training = loaded.info.tokens_trained, loaded.info.recipe
    check_trainable(model.config)
    tokenizer = load_tokenizer(folder)
    rows = load_windows(
        text, tokenizer, length=length, seed=0, vocab_size=model.config.vocab_size, first=num_windows
    ).tokens
    segments = [torch.from_numpy(row.astype("int64")) for row in rows]
    compared = variants(model, load_teacher(teacher_path, device=device))
    scores = _scores(compared, segments, console)
    return Evaluation(
        model=folder.resolve().name,
        teacher=origin.teacher,
        title=title(model.config),
        tokens_trained=tokens_trained,
        training=training,
        text=[file.name for file in text_files(text)],
        window_tokens=length,
        num_windows=len(segments),
        scores=scores,
        state_bytes={variant.name: variant.state_bytes for variant in compared},
        gap_closed=gap_closed(scores, list(scores)[:3]),
        recall=recall_probe(compared, torch.cat(segments), tokenizer, num_facts=num_facts) if num_facts else [],
    )


def _scores(compared: list[Variant], segments: list[Tensor], console: Console) -> dict[str, Score]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("evaluating", total=len(compared) * len(segments))
        return {
            variant.name: score(variant, segments, on_window=lambda: progress.advance(task)) for variant in compared
        }
