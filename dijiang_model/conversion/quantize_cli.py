"""`dijiang quantize`: the command line of the quantizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape

from dijiang_model.conversion.bars import bars, counted, sizes
from dijiang_model.conversion.cli import parse_size
from dijiang_model.errors import ModelError
from dijiang_model.formats.sizes import size_text
from dijiang_model.program import program
from dijiang_model.quantization.config import DEFAULT_GROUP_SIZE, GROUP_SIZES, WeightKind

if TYPE_CHECKING:
    from dijiang_model.conversion.quantize import QuantizedFolder


def quantize_command(
    model: Annotated[Path, typer.Argument(help="Folder of a DiJiang model whose weights are not quantized yet.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears complete or not at all.")],
    weights: Annotated[
        str, typer.Option(help="int8: a scale for each row. int4: projections in groups; embedding and head int8.")
    ] = "int4",
    group_size: Annotated[
        int, typer.Option(help="int4: inputs under one scale, 32 or 64. Smaller is more exact and larger.")
    ] = DEFAULT_GROUP_SIZE,
    minimums: Annotated[
        bool | None,
        typer.Option(
            "--minimums/--no-minimums",
            help="int4: groups with a minimum of their own. Default: where that halves the squared error, as for "
            "weights that were in such groups before (GGUF Q4_1).",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes in a file of weights, e.g. 500M or 2G.")] = "2G",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model saved by this program.")
    ] = False,
) -> None:
    """Round a model's weights to int8 or int4 and save it."""
    console = Console(stderr=True)
    if weights not in get_args(WeightKind):
        raise typer.BadParameter(f"{weights!r} is none of {', '.join(get_args(WeightKind))}", param_hint="--weights")
    if group_size not in GROUP_SIZES:
        raise typer.BadParameter(
            f"{group_size} is none of {', '.join(map(str, GROUP_SIZES))}", param_hint="--group-size"
        )
    if weights == "int8" and (group_size != DEFAULT_GROUP_SIZE or minimums is not None):
        raise typer.BadParameter("int8 weights have a scale for each row, no groups", param_hint="--weights")
    max_shard_bytes = parse_size(max_shard_size)
    # Imported late, as in `convert_command`.
    from dijiang_model.conversion.quantize import description, quantize_folder

    try:
        with bars(console) as progress:
            made = quantize_folder(
                model,
                out,
                kind=cast(WeightKind, weights),
                group_size=group_size,
                has_minimums=minimums,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                on_progress=counted(progress, "rounding", sizes),
            )
    except ModelError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        console.print(f"Stopped; nothing was written to {escape(str(out))}", highlight=False)
        raise typer.Exit(130) from error
    console.print(escape(description(made.quantization)), highlight=False)
    _summarise(made, out, console)


def _summarise(made: "QuantizedFolder", out: Path, console: Console) -> None:
    console.print(f"{size_text(made.bytes_before)} before, {size_text(made.bytes_after)} after", highlight=False)
    console.print(f"Serve it with `{program()} serve {escape(str(out))}`", highlight=False)
