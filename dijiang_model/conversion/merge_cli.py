"""`dijiang merge`: the command line of merging."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dijiang_model.errors import ConversionError, ModelError
from dijiang_model.program import program


def merge_command(
    model: Annotated[Path, typer.Argument(help="Folder of the converted model that was trained.")],
    adapter: Annotated[Path, typer.Argument(help="Its adapter, as `dijiang train` writes it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears complete or not at all.")],
    report: Annotated[
        Path | None, typer.Option(help="Folder of `dijiang evaluate`: its tables go into the model card.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model saved by this program.")
    ] = False,
) -> None:
    """Merge a trained adapter into its model, ready to be served."""
    # Imported late, as in `convert_command`.
    from dijiang_model.checkpoints.outputs import output_folder
    from dijiang_model.conversion.evaluation.report import TABLES_FILE
    from dijiang_model.conversion.merge import merge

    console = Console(stderr=True)
    try:
        evaluation = None
        if report is not None:
            output_folder(out, inputs=[report / TABLES_FILE])
            evaluation = _tables(report / TABLES_FILE)
        name = merge(model, adapter, out, evaluation=evaluation, overwrite=overwrite)
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    console.print(f"{name}. Serve it with `{program()} serve {escape(str(out))}`", highlight=False)


def _tables(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ConversionError(f"{file.parent} holds no {file.name}, as `dijiang evaluate` writes it") from error
